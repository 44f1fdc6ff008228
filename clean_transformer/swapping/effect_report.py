"""Writes an `Effect` to the terminal, to a JSON file, or to an HTML page."""

from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from clean_transformer.reports.heat_map import HeatMap, Square, block_of, heat_map, rank, shade
from clean_transformer.reports.page import number, render_page
from clean_transformer.reports.plain import Schema
from clean_transformer.support.files import write_atomically
from clean_transformer.swapping.effects import Change, Effect

if TYPE_CHECKING:
    import rich.console
    import rich.table

SCHEMA = Schema("clean-transformer/effect", version=1)
to_json, write_json = SCHEMA.to_json, SCHEMA.write_json

# The upper bounds of the shades (colors on the page): a change has the shade i if it is at most
# `SIZES[i]` and above `SIZES[i - 1]`. The terminal shows the shade i as the character `BARS[i]` in
# the color `COLORS[i]`.
SIZES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, inf)
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

# A report shows this instead of a number if only one of the two models computes the activation, or
# if the activation has different shapes in the two models.
NO_SIZE = "×"

# A report lists this many activations with the largest introduced changes (see `Change`).
LISTED = 10


def total_map(report: Effect) -> HeatMap:
    """Return a heat map of the total change of each activation."""
    return heat_map({row.name: square(row, row.total) for row in report.rows})


def introduced_map(report: Effect) -> HeatMap:
    """Return a heat map of the introduced change of each activation that a new module computes."""
    return heat_map(
        {row.name: square(row, row.introduced) if row.module else None for row in report.rows}
    )


def square(change: Change, size: float | None) -> Square:
    """Return the square of a heat map for the activation that `change` describes.

    `size` is `change.total` or `change.introduced`, and determines the color. If `size` is None,
    the square shows `NO_SIZE`.
    """
    sizes = {
        "total": change.total,
        "introduced": change.introduced,
        "inherited": change.inherited,
        "scale": change.scale,
    }
    shown = {name: "" if value is None else number(value, 4) for name, value in sizes.items()}
    facts = {"name": change.name, **shown, "module": change.module, "note": change.note}
    level = 0 if size is None else shade(size, SIZES)
    return Square(
        facts=facts,
        label=NO_SIZE if size is None else number(size, 2),
        concern=-1.0 if size is None else rank(size),
        shade=level,
        bar=BARS[level],
        style=COLORS[level],
        mark=NO_SIZE if size is None else "",
    )


def places(report: Effect) -> dict[tuple[str, str], list[str]]:
    """Return the paths of the swapped modules. The keys are (old class name, new class name)."""
    groups: dict[tuple[str, str], list[str]] = {}
    for swapped in report.swapped:
        groups.setdefault((swapped.old, swapped.new), []).append(swapped.path)
    return groups


def notes(report: Effect) -> list[str]:
    """Return the notes of the report's rows, as texts for people.

    If several activations have the same note in the same blocks, they have one text. Each text
    names the activations and the blocks, and then gives the note.
    """
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
    """Return a text that lists `names`; of more than three names, only three and the count."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, … {names[-1]} ({len(names)})"


def render(report: Effect) -> str:
    """Return the report as an HTML page that works offline and needs no other file."""
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
    """Write the report as an HTML page to `file`. If an error occurs, `file` does not change."""
    write_atomically(file, render(report))


def print_effect(report: Effect, console: "rich.console.Console") -> None:
    """Print which modules were swapped, and how the predictions and each activation changed."""
    from clean_transformer.reports.terminal import heat_map_table

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
    console.print(
        heat_map_table({"changed": total_map(report), "introduced": introduced_map(report)})
    )
    bars = dict(zip(BARS, SIZES, strict=True))  # if a bar has several bounds, the largest stays
    say(
        "  ".join(f"{bar} ≤ {number(size)}" for bar, size in bars.items()),
        f"in units of the original's root mean square; {NO_SIZE} only one model has it, or the "
        "shapes differ",
    )
    if report.most_introduced:
        console.print("", _most_introduced(report))
    if notes(report):
        say("", *notes(report))


def _most_introduced(report: Effect) -> "rich.table.Table":
    from rich.table import Table

    table = Table(
        "introduced most", "introduced", "inherited", "changed", box=None, padding=(0, 2, 0, 0)
    )
    for row in report.most_introduced[:LISTED]:
        sizes = (row.introduced or 0, row.inherited or 0, row.total or 0)
        table.add_row(row.name, *(number(size, 2) for size in sizes))
    return table
