"""What the reports have in common: plain values for JSON, and pages that need nothing else."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jinja2 import Environment, PackageLoader, StrictUndefined

from clean_transformer.files import write_atomically


def plain(value: Any) -> Any:
    """A report's dataclasses as values that JSON has, with what follows from their fields."""
    if is_dataclass(value) and not isinstance(value, type):
        fields = {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
        derived = ("verdict", "rho", "coverage")
        return fields | {
            name: plain(getattr(value, name)) for name in derived if hasattr(value, name)
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no inf and no nan
    return value


def write_plain(values: Mapping[str, Any], file: Path) -> None:
    """Write plain values as JSON, whole or not at all."""
    write_atomically(file, json.dumps(values, indent=1, allow_nan=False) + "\n")


def render_page(template: str, **context: Any) -> str:
    """The page that a template of `templates/` makes: one file, without a network."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["number"] = number
    return environment.get_template(template).render(context)


def number(value: int | float | str, digits: int = 3) -> str:
    """A number to read, also one that is none."""
    value = float(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{'−' if value < 0 else ''}∞"
    return f"{float(f'{value:.{digits}g}'):g}"


@runtime_checkable
class Square(Protocol):
    """A square of a heat map: one of 12 shades, 0 for nothing at all."""

    @property
    def facts(self) -> dict[str, str]:
        """What is told on hover, its name first."""

    @property
    def shade(self) -> int:
        """Which colour it has, from 0 to 11."""

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
