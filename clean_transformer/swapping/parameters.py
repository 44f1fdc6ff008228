"""Compares the parameters of a new module with those of the module that it replaces."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parameters:
    """The names of a new module's parameters, and of the old parameters that it does not have.

    - `copied`: the new parameter equals the old parameter of the same name.
    - `new`: the other parameters of the new module.
    - `left_over`: the old parameters that are not in `copied`.
    """

    copied: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds = {"copied": self.copied, "new": self.new, "left over of the old": self.left_over}
        said = [f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names]
        return "; ".join(said) or "none"


def compare(new: Mapping[str, Tensor], *old: Mapping[str, Tensor]) -> Parameters:
    """Compare the parameters `new` with `old`, by their names.

    `old` has the old parameters, once for each way to name them. The way that fits best counts.
    """
    copied = [
        [name for name, weight in new.items() if name in named and _equal(weight, named[name])]
        for named in old
    ]
    best = max(range(len(old)), key=lambda way: len(copied[way]))
    return Parameters(
        tuple(copied[best]),
        tuple(name for name in new if name not in copied[best]),
        tuple(name for name in old[best] if name not in copied[best]),
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.device != other.device:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


@contextmanager
def marked_memory() -> Iterator[None]:
    """Let `torch.empty` fill its memory with NaN, to recognize weights that are never set."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(1)  # fills memory; 1 warns, and 2 would raise an error
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
