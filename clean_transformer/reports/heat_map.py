"""TODO reports/heat_map."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Square(Protocol):
    """A square of a heat map: one of 12 shades, 0 for nothing at all."""

    @property
    def facts(self) -> dict[str, str]:
        """What is told on hover, its name first."""

    @property
    def shade(self) -> int:
        """Which color it has, from 0 to 11."""

    @property
    def mark(self) -> str:
        """What is written on it, if anything."""

    @property
    def label(self) -> str:
        """Its value, to read."""

    @property
    def concern(self) -> Any:
        """What puts it before others."""


@dataclass(frozen=True)
class HeatMap:
    """Layers × activations, in the order of the forward pass, and what is outside of the blocks."""

    layers: list[int]
    before: dict[str, Square]
    points: dict[str, dict[int, Square]]
    after: dict[str, Square]

    def worst(self, point: str) -> Square:
        """The square of most concern of an activation, over the layers."""
        return max(self.points[point].values(), key=lambda square: square.concern)

    @property
    def fields(self) -> list[str]:
        """The names of every square's facts."""
        squares = [*self.before.values(), *self.after.values()]
        squares += [square for places in self.points.values() for square in places.values()]
        return [*squares[0].facts] if squares else []


def heat_map(squares: Mapping[str, Square | None]) -> HeatMap:
    """Lay the activations out that are given by name, in the order of the forward pass.

    Those without a square only tell where the others are.
    """
    before: dict[str, Square] = {}
    points: dict[str, dict[int, Square]] = {}
    after: dict[str, Square] = {}
    outside = before
    for name, square in squares.items():
        block, point = block_of(name)
        if block is not None:
            outside = after
        if square is not None:
            if block is None:
                outside[name] = square
            else:
                points.setdefault(point, {})[block] = square
    layers = sorted({layer for places in points.values() for layer in places})
    return HeatMap(layers, before, points, after)


def block_of(name: str) -> tuple[int | None, str]:
    """Which block an activation is in, if any, and its name there."""
    if not name.startswith("blocks."):
        return None, name
    _, block, *point = name.split(".")
    return int(block), ".".join(point)
