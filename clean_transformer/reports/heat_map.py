"""Heat maps of a model's activations: layers × activations, for a terminal and for a page."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan
from typing import Any


@dataclass(frozen=True)
class Square:
    """One square of a heat map.

    `facts` are shown when the reader points at the square; the activation's name is the first.
    `label` is the value as text. `shade` is the color on a page, from 0 (exactly zero) to 11.
    `mark` is a character on the square, so that color alone does not carry the meaning; without
    one, a terminal prints `bar`, in rich's `style`. The square with the largest `concern` stands
    for its row.
    """

    facts: dict[str, str]
    label: str
    concern: Any
    shade: int
    bar: str
    style: str
    mark: str = ""


def shade(value: float, limits: Sequence[float]) -> int:
    """Index of the first of 12 rising `limits` that the value does not exceed; 11 for NaN."""
    return len(limits) - 1 if isnan(value) else bisect_left(limits, value)


def rank(value: float) -> float:
    """The value for sorting: NaN counts as infinite."""
    return inf if isnan(value) else value


@dataclass(frozen=True)
class HeatMap:
    """The squares of a model, in the order of the forward pass.

    `before` and `after` hold what is outside of the blocks, by name. `points` holds each
    activation inside a block: its square in every layer that has one.
    """

    layers: list[int]
    before: dict[str, Square]
    points: dict[str, dict[int | None, Square]]
    after: dict[str, Square]

    @property
    def rows(self) -> dict[str, dict[int | None, Square]]:
        """Every activation's squares by layer; the layer is None outside of the blocks."""
        rows: dict[str, dict[int | None, Square]] = {}
        rows |= {name: {None: square} for name, square in self.before.items()}
        rows |= self.points
        return rows | {name: {None: square} for name, square in self.after.items()}

    def worst(self, name: str) -> Square:
        """The square of most concern in that row."""
        return max(self.rows[name].values(), key=lambda square: square.concern)

    @property
    def fields(self) -> list[str]:
        """The names of the facts, which all squares share."""
        return next(([*square.facts] for row in self.rows.values() for square in row.values()), [])


def heat_map(squares: Mapping[str, Square | None]) -> HeatMap:
    """Arrange squares, given by activation name in the order of the forward pass.

    Entries that are None only say where the blocks begin and end.
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
    """The block that an activation is in, and its name there: "output" if it is the block's own.

    Outside of the blocks: None and the whole name.
    """
    if not name.startswith("blocks."):
        return None, name
    _, block, *point = name.split(".")
    return int(block), ".".join(point) or "output"
