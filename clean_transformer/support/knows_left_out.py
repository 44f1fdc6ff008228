"""`KnowsLeftOut`: a module whose errors say what to use instead of TransformerLens's names."""

from typing import Any

from torch import nn

from clean_transformer.support.left_out import has_no


class KnowsLeftOut(nn.Module):
    """A module with helpful errors for attributes that TransformerLens has and this package lacks.

    Reading such an attribute raises an `AttributeError` that says what to use instead. If a
    property raises an `AttributeError`, its message stays. (`nn.Module` would replace the message.)
    """

    def __getattr__(self, name: str) -> Any:
        # Python also calls `__getattr__` after a property raised an AttributeError.
        if hasattr(type(self), name):
            return getattr(type(self), name).__get__(self)
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(has_no(self, name)) from None
