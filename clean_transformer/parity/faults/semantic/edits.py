"""`SemanticFault`, and functions that make the changes for a fault.

A planted fault replaces methods of our classes or functions in our files. So it affects every
instance of our model, even if the model was made before, on the explicit and on the fused path. It
does not change the stored weights, and it does not affect other implementations of GPT-2.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Edit = Callable[[Tensor], Tensor]
# An object (a class or a Python module), the name of its attribute to replace, and a function that
# takes the attribute's right value and returns the faulty value.
Change = tuple[Any, str, Callable[[Any], Any]]
Changes = tuple[Change, ...]


@dataclass(frozen=True)
class SemanticFault:
    """A mistake in the model's code, such that the model computes another function.

    `first` is an `fnmatch` pattern for the first activation that differs: the name of a hook point,
    or of a LayerNorm for its output. An activation that is no longer computed also counts as
    different. `changes` are the replacements that plant the fault.
    """

    name: str
    description: str
    first: str
    changes: Changes

    def plant(self) -> AbstractContextManager[Any]:
        """A context manager that plants the fault inside a `with` block."""
        return planted(self.changes)


@contextmanager
def planted(changes: Changes) -> Iterator[None]:
    """Make the changes inside a `with` block, and undo them at its end."""
    with ExitStack() as stack:
        for owner, attribute, change in changes:
            faulty = change(getattr(owner, attribute))
            stack.enter_context(replaced(owner, attribute, faulty))
        yield


@contextmanager
def replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """Replace an attribute of `owner` by `value` inside a `with` block."""
    original = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, original)


class _Bound(nn.Module):
    """Wraps a module, so that `functional_call` can run its original `forward`.

    The class's own `forward` is the faulty one, and would call itself.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        self.module = module
        self.original = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original `forward` on the wrapped module."""
        return self.original(self.module, *args, **kwargs)


def parameters(owner: type, edit: Callable[[Any], dict[str, Tensor]]) -> Changes:
    """Modules of the class `owner` run with other parameters.

    `edit(module)` returns the replaced parameters by name.
    """

    def change(forward: Any) -> Any:
        def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
            values = {f"module.{name}": value for name, value in edit(self).items()}
            return functional_call(_Bound(self, forward), values, args, kwargs)

        return faulty

    return ((owner, "forward", change),)


def edited(owner: type, edits: dict[str, Edit]) -> Changes:
    """Modules of the class `owner` run with edited parameters. `edits` maps names to edits."""
    return parameters(
        owner, lambda module: {n: edit(module.get_parameter(n)) for n, edit in edits.items()}
    )


def mistaken(owner: type, others: dict[str, str]) -> Changes:
    """Modules of the class `owner` use wrong parameters.

    `others` maps the name of each replaced parameter to the name of the parameter used instead.
    """
    return parameters(
        owner, lambda module: {name: module.get_parameter(n) for name, n in others.items()}
    )


def arguments(owner: type, edit: Edit) -> Changes:
    """Modules of the class `owner` run on a first argument that `edit` has changed."""

    def change(forward: Any) -> Any:
        return lambda self, x, *args, **kwargs: forward(self, edit(x), *args, **kwargs)

    return ((owner, "forward", change),)


def result(owner: type, edit: Edit) -> Changes:
    """Modules of the class `owner` return a result that `edit` has changed."""

    def change(forward: Any) -> Any:
        return lambda *args, **kwargs: edit(forward(*args, **kwargs))

    return ((owner, "forward", change),)


def child(owner: type, name: str, substitute: Callable[[Any], nn.Module]) -> Changes:
    """Modules of the class `owner` run with another submodule `name`.

    `substitute(submodule)` returns the module that is used instead.
    """

    def change(forward: Any) -> Any:
        def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
            with replaced(self, name, substitute(getattr(self, name))):
                return forward(self, *args, **kwargs)

        return faulty

    return ((owner, "forward", change),)


def unchanged(activation: Tensor) -> Tensor:
    """An edit that changes nothing."""
    return activation


def element(edit: Edit, *index: int) -> Edit:
    """An edit that applies `edit` only to the element or slice at `index`."""

    def change(weight: Tensor) -> Tensor:
        changed = weight.clone()
        changed[index] = edit(weight[index])
        return changed

    return change


def without(*names: str) -> dict[str, Edit]:
    """Edits that set the named parameters to zero."""
    return dict.fromkeys(names, torch.zeros_like)


def reread(weight: Tensor) -> Tensor:
    """The matrix that results if the memory of `weight` is read as the memory of its transpose.

    People make this mistake when they convert between Conv1D [in out] and Linear [out in].
    """
    return weight.T.reshape(weight.shape)
