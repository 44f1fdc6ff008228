"""What a person and a program see of a swap's effect: the terminal, JSON and a page."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isnan
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from clean_transformer.reports.heat_map import HeatMap, Square, block_of, heat_map
from clean_transformer.reports.page import number, render_page
from clean_transformer.reports.plain import plain, write_plain
from clean_transformer.support.files import write_atomically
from clean_transformer.swapping.effects import Change, Effect

SCHEMA = "clean-transformer/effect"


SCHEMA_VERSION = 1


# A size's shade is the first of these that it does not exceed; a terminal shows it as a bar.
SIZES = (0, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1, inf)


BARS = "·▁▁▂▂▃▃▄▅▆▇█"


COLORS = (
    "bright_black",
    *["blue"] * 4,
    *["cyan"] * 2,
    "green",
    "yellow",
    "dark_orange",
    "red",
    "bold red",
)


NO_SIZE = "×"


# How many of the activations are listed that the new modules change the most.
LISTED = 10


@dataclass(frozen=True)
class SizeSquare:
    """A square of a heat map: one of the sizes of a change, crossed out if there is none."""

    change: Change
    size: float | None

    @property
    def facts(self) -> dict[str, str]:
        """What is told on hover."""
        change = self.change
        sizes = {
            "total": change.total,
            "introduced": change.introduced,
            "inherited": change.inherited,
            "scale": change.scale,
        }
        shown = {name: "" if size is None else number(size, 4) for name, size in sizes.items()}
        return {"name": change.name, **shown, "module": change.module, "note": change.note}

    @property
    def shade(self) -> int:
        """0 where nothing changed, 11 where more than the activation's own size did."""
        if self.size is None:
            return 0
        return len(SIZES) - 1 if isnan(self.size) else bisect_left(SIZES, self.size)

    @property
    def mark(self) -> str:
        """A cross where there is no size."""
        return NO_SIZE if self.size is None else ""

    @property
    def label(self) -> str:
        """The size, to read."""
        return NO_SIZE if self.size is None else number(self.size, 2)

    @property
    def concern(self) -> float:
        """The larger, the more changed."""
        if self.size is None:
            return -1.0
        return inf if isnan(self.size) else self.size


def total_map(report: Effect) -> HeatMap:
    """Layers × activations, by how much of each is another."""
    return heat_map({row.name: SizeSquare(row, row.total) for row in report.rows})


def introduced_map(report: Effect) -> HeatMap:
    """The same of what the new modules make, by how much they make otherwise."""
    return heat_map(
        {row.name: SizeSquare(row, row.introduced) if row.module else None for row in report.rows}
    )


def places(report: Effect) -> dict[tuple[str, str], list[str]]:
    """Where each class stands for which other."""
    groups: dict[tuple[str, str], list[str]] = {}
    for swapped in report.swapped:
        groups.setdefault((swapped.old, swapped.new), []).append(swapped.path)
    return groups


def notes(report: Effect) -> list[str]:
    """What there is to know of some activations, with where they are."""
    blocks: dict[tuple[str, str], list[str]] = {}
    for row in report.rows:
        if row.note:
            block, point = block_of(row.name)
            blocks.setdefault((point, row.note), []).append("" if block is None else str(block))
    points: dict[tuple[str, str], list[str]] = {}
    for (point, note), where in blocks.items():
        points.setdefault((in_words(where), note), []).append(point)
    return [
        f"{', '.join(named)}{where and f' in block {where}'}: {note}"
        for (where, note), named in points.items()
    ]


def in_words(names: list[str]) -> str:
    """The names, or of many the first and the last."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, … {names[-1]} ({len(names)})"


def to_json(report: Effect) -> dict[str, Any]:
    """The whole report as plain values; see `SCHEMA_VERSION`."""
    return {"schema": SCHEMA, "version": SCHEMA_VERSION, **plain(report)}


def write_json(report: Effect, file: Path) -> None:
    """Write the report, whole or not at all."""
    write_plain(to_json(report), file)


def render(report: Effect) -> str:
    """The report as a page that needs nothing else."""
    return render_page(
        "effect.html.jinja",
        report=report,
        sizes=SIZES,
        places=places(report),
        total=total_map(report),
        introduced=introduced_map(report),
        listed=report.most_introduced[:LISTED],
        notes=notes(report),
    )


def write_html(report: Effect, file: Path) -> None:
    """Write the page, whole or not at all."""
    write_atomically(file, render(report))


def print_effect(report: Effect, console: Console) -> None:
    """What was swapped, what it did to the predictions, and then to each activation."""

    def say(*lines: str) -> None:
        console.print(*lines, sep="\n", markup=False, highlight=False)

    batch, length = report.tokens
    say(report.title, f"{batch} × {length} tokens, {report.dtype} on {report.device}")
    for (old, new), paths in places(report).items():
        say(f"swapped: {old} → {new} at {in_words(paths)}")
    felt, first = report.impact, report.first_change
    say(
        "",
        f"output: {felt.top1_flips} of {felt.positions} top-1 predictions flipped, "
        f"KL divergence {felt.kl_divergence:.2g} nats, loss {felt.loss_change:+.2g} nats",
        f"first changed: {first.name}, by {number(first.total or 0, 2)} of its size"
        if first
        else "no activation changed",
        "",
    )
    console.print(_map(report))
    bars = dict(zip(BARS, SIZES, strict=True))  # of those that look alike, the last
    say(
        "  ".join(f"{bar} ≤ {number(size)}" for bar, size in bars.items()),
        f"of the original's root mean square; {NO_SIZE} in one model only, or of another shape",
    )
    if report.most_introduced:
        console.print("", _most_introduced(report))
    if notes(report):
        say("", *notes(report))


def _map(report: Effect) -> Table:
    total, introduced = total_map(report), introduced_map(report)
    ruler = "".join(str(layer % 10) for layer in total.layers)
    # A narrow terminal continues the layers on the next line.
    layers = Column(ruler, overflow="fold")
    table = Table("", layers, "changed", "introduced", box=None, padding=(0, 2, 0, 0))

    def outside(squares: Mapping[str, Square], own: Mapping[str, Square]) -> None:
        for name, square in squares.items():
            table.add_row(name, _bar(square), square.label, own[name].label if name in own else "")

    outside(total.before, introduced.before)
    for point, squares in total.points.items():
        bars = (_bar(squares[layer]) if layer in squares else Text(" ") for layer in total.layers)
        own = introduced.worst(point).label if point in introduced.points else ""
        table.add_row(point or "output", Text.assemble(*bars), total.worst(point).label, own)
    outside(total.after, introduced.after)
    return table


def _bar(square: Square) -> Text:
    return Text(square.mark or BARS[square.shade], style=COLORS[square.shade])


def _most_introduced(report: Effect) -> Table:
    table = Table(
        "introduced most", "introduced", "inherited", "changed", box=None, padding=(0, 2, 0, 0)
    )
    for row in report.most_introduced[:LISTED]:
        sizes = (row.introduced or 0, row.inherited or 0, row.total or 0)
        table.add_row(row.name, *(number(size, 2) for size in sizes))
    return table
