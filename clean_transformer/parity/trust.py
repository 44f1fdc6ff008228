"""Keeping the oracle apart from the device under test."""

from contextlib import AbstractContextManager

from torch.utils._python_dispatch import _disable_current_modes


def trusted() -> AbstractContextManager[object]:
    """Run outside every dispatch mode: the oracle must see no injected fault and no refusal."""
    return _disable_current_modes()
