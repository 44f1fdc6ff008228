"""Heat maps of a model's activations, by layer, for a terminal and for an HTML page."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan
from typing import Any


@dataclass(frozen=True)
class Square:
    """One square of a heat map: one activation in one layer.

    - `facts`: heading and text of each fact that a page shows when the reader points at the
      square. The first fact is the activation's name.
    - `label`: the square's value as text.
    - `concern`: how bad the value is. The square with the largest `concern` represents its row.
    - `shade`: the color on a page, from 0 (the value is exactly zero) to 11.
    - `bar`: the character that a terminal prints if there is no `mark`.
    - `style`: how `rich` prints that character.
    - `mark`: a character on the square, so that readers do not depend on the color; "" for none.
    """

    facts: dict[str, str]
    label: str
    concern: Any
    shade: int
    bar: str
    style: str
    mark: str = ""


def shade(value: float, limits: Sequence[float]) -> int:
    """Index of the first of 12 ascending `limits` that is not below the value; 11 for NaN."""
    return len(limits) - 1 if isnan(value) else bisect_left(limits, value)


def rank(value: float) -> float:
    """The value to sort by: infinity for NaN, otherwise `value` itself."""
    return inf if isnan(value) else value


@dataclass(frozen=True)
class HeatMap:
    """The squares of a model's activations, in the order of the forward pass.

    - `layers`: the indices of the blocks that have squares.
    - `before`, `after`: the squares before the first block and after the last block, by
      activation name.
    - `points`: the squares inside the blocks, by activation name within the block, then by layer.
    """

    layers: list[int]
    before: dict[str, Square]
    points: dict[str, dict[int | None, Square]]
    after: dict[str, Square]

    @property
    def rows(self) -> dict[str, dict[int | None, Square]]:
        """All squares by activation name, then by layer (None outside of the blocks)."""
        rows: dict[str, dict[int | None, Square]] = {}
        rows |= {name: {None: square} for name, square in self.before.items()}
        rows |= self.points
        return rows | {name: {None: square} for name, square in self.after.items()}

    def worst(self, name: str) -> Square:
        """The square with the largest `concern` in the row of the activation `name`."""
        return max(self.rows[name].values(), key=lambda square: square.concern)

    @property
    def fields(self) -> list[str]:
        """The headings of the facts. All squares have the same headings."""
        return next(([*square.facts] for row in self.rows.values() for square in row.values()), [])


def heat_map(squares: Mapping[str, Square | None]) -> HeatMap:
    """Arrange squares by layer. `squares` has activation names, in the order of the forward pass.

    An entry that is None is not drawn. It only shows where the blocks begin and end.
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
    """The index of the block that computes an activation, and the activation's name in that block.

    The name of the block's own output is "output". For an activation outside of the blocks, the
    result is None and the unchanged name.
    """
    if not name.startswith("blocks."):
        return None, name
    _, block, *point = name.split(".")
    return int(block), ".".join(point) or "output"
