"""`at`: the activation at some positions, which may be given as in TransformerLens."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor


@runtime_checkable
class Sliced(Protocol):
    """A `Slice` of TransformerLens, whose attribute `slice` holds the positions."""

    slice: Any


# Some positions: one position, a range (start, end) or (start, end, step), a list of positions, or
# None for all positions. With a single position, the result has no position axis.
Positions = int | tuple[int, ...] | list[int] | slice | Tensor | np.ndarray | Sliced | None


def at(activation: Tensor, positions: Positions, axis: int = -2) -> Tensor:
    """Return the activation at `positions`. `axis` is the negative index of the position axis."""
    where: Any = positions.slice if isinstance(positions, Sliced) else positions
    if where is None:
        return activation
    where = slice(*where) if isinstance(where, tuple) else where
    index = (..., where, *[slice(None)] * (-axis - 1))
    return activation[index]
