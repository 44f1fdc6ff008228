"""Heat maps: one square for each activation in each layer. Terminals and HTML pages show them."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan
from typing import Any


@dataclass(frozen=True)
class Square:
    """One square of a heat map: one activation in one layer.

    - `facts`: what an HTML page shows when the mouse points at the square. The keys are headings,
      and the values are texts. The first text is the activation's name.
    - `label`: the square's value as text.
    - `concern`: how bad the value is. A larger `concern` is worse.
    - `shade`: the number of the square's color on an HTML page, from 0 (the value is exactly zero)
      to 11.
    - `bar`: the character that a terminal prints for the square if `mark` is "".
    - `style`: the color of this character in a terminal, as a style of the library `rich`.
    - `mark`: a character on the square, for readers who cannot see the colors; "" for none.
    """

    facts: dict[str, str]
    label: str
    concern: Any
    shade: int
    bar: str
    style: str
    mark: str = ""


def shade(value: float, limits: Sequence[float]) -> int:
    """Return the index of the first limit that is at least `value`, or the last index for NaN.

    `limits` holds 12 numbers in ascending order.
    """
    return len(limits) - 1 if isnan(value) else bisect_left(limits, value)


def rank(value: float) -> float:
    """Return the number to sort `value` by: infinity for NaN, otherwise `value` itself."""
    return inf if isnan(value) else value


@dataclass(frozen=True)
class HeatMap:
    """A heat map: one `Square` for each activation in each layer, in forward-pass order.

    - `layers`: the indices of the blocks that the heat map shows.
    - `before`: the squares of the activations before the first block, by the activation's name.
    - `points`: the squares of the activations inside the blocks. The first key is the activation's
      name without the block: "attn.hook_pattern" for "blocks.3.attn.hook_pattern". The second key
      is the index of the block.
    - `after`: the squares of the activations after the last block, by the activation's name.
    """

    layers: list[int]
    before: dict[str, Square]
    points: dict[str, dict[int | None, Square]]
    after: dict[str, Square]

    @property
    def rows(self) -> dict[str, dict[int | None, Square]]:
        """All squares. The first key is the activation's key in `before`, `points` or `after`.

        The second key is the index of the block, or None for an activation outside of the blocks.
        """
        rows: dict[str, dict[int | None, Square]] = {}
        rows |= {name: {None: square} for name, square in self.before.items()}
        rows |= self.points
        return rows | {name: {None: square} for name, square in self.after.items()}

    def worst(self, name: str) -> Square:
        """Return the square with the largest `concern` among the squares of activation `name`."""
        return max(self.rows[name].values(), key=lambda square: square.concern)

    @property
    def fields(self) -> list[str]:
        """The headings of the squares' `facts`. All squares have the same headings."""
        return next(([*square.facts] for row in self.rows.values() for square in row.values()), [])


def heat_map(squares: Mapping[str, Square | None]) -> HeatMap:
    """Arrange the squares of a heat map by layer. Each square shows one activation.

    The keys of `squares` are the full names of the activations, in the order of the forward pass.
    An activation outside of the blocks is placed in `HeatMap.before` if its key comes before all
    keys of blocks, and in `HeatMap.after` otherwise. A key whose value is None gets no square; it
    only shows where the blocks begin.
    """
    layers: set[int] = set()
    before: dict[str, Square] = {}
    points: dict[str, dict[int | None, Square]] = {}
    after: dict[str, Square] = {}
    outside = before
    for name, square in squares.items():
        block, point = block_of(name)
        if block is not None:
            outside = after
        if square is not None and block is None:
            outside[name] = square
        elif square is not None and block is not None:
            points.setdefault(point, {})[block] = square
            layers.add(block)
    return HeatMap(sorted(layers), before, points, after)


def block_of(name: str) -> tuple[int | None, str]:
    """Return the index of the activation's block, and the activation's name in the block.

    For "blocks.3.attn.hook_z", the result is 3 and "attn.hook_z". For "blocks.3", the output of the
    block, the result is 3 and "output". For an activation outside of the blocks, the result is None
    and the unchanged `name`.
    """
    if not name.startswith("blocks."):
        return None, name
    _, block, *point = name.split(".")
    return int(block), ".".join(point) or "output"
