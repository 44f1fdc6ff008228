"""`Effect`: shows what a swap changes, in a terminal or notebook, as JSON or as an HTML page."""

from dataclasses import dataclass
from math import inf, isnan, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from clean_transformer.analysis.comparison import Impact
from clean_transformer.config import Config
from clean_transformer.reports.heat_map import HeatMap, Square, block_of, heat_map, rank, shade
from clean_transformer.reports.page import framed, in_words, number, render_page
from clean_transformer.reports.plain import Schema
from clean_transformer.support.files import write_atomically
from clean_transformer.swapping.swapped import Swapped, by_classes, by_parameters, in_one_line

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

# The machine epsilon of each dtype.
EPSILONS = {"float64": 2**-52, "float32": 2**-23, "bfloat16": 2**-7, "float16": 2**-10}

# A report lists this many activations with the largest introduced changes (see `Change`).
LISTED = 10


@dataclass(frozen=True)
class Change:
    """How much one activation of the swapped model differs from the original model's activation.

    There are three versions of the activation. The swapped activation is from the model with the
    new modules. The original activation is from the model with the old modules. The isolated
    activation is what the old module computes from the inputs of the new module.

    - `name`: the full name of the activation.
    - `module`: the path of the swapped module that computes the activation, or "" if no swapped
      module computes it. In this case, `introduced` is 0, and `inherited` equals `total`.
    - `scale`: the root mean square of the original activation.
    - `total`: the root mean square of (swapped − original), divided by `scale`.
    - `introduced`: the root mean square of (swapped − isolated), divided by `scale`.
    - `inherited`: the root mean square of (isolated − original), divided by `scale`.
    - `note`: a remark, or "". If the four numbers are None, the note says why.
    """

    name: str
    module: str
    scale: float | None = None
    total: float | None = None
    introduced: float | None = None
    inherited: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Effect:
    """The result of `effect`: how a swap changed the predictions and each activation.

    - `title`: the headline of the report.
    - `cfg`: the architecture of the model.
    - `device` and `dtype`: where and in which precision the model ran.
    - `tokens`: the shape (batch, pos) of the model's input tokens.
    - `environment`: the versions of Python, packages and libraries, and the name of the processor.
    - `swapped`: for each swapped module, its path, and the class names of the old and new module.
    - `impact`: how much the predictions changed, for example the KL divergence.
    - `rows`: the change of each activation, in the order of the forward pass.
    """

    title: str
    cfg: Config
    device: str
    dtype: str
    tokens: tuple[int, int]
    environment: dict[str, str]
    swapped: list[Swapped]
    impact: Impact
    rows: list[Change]

    @property
    def first_change(self) -> Change | None:
        """The first activation that a new module changed by more than `rounding`, if there is one.

        NaN counts as a change.
        """
        return next((row for row in self.rows if not (row.introduced or 0) <= self.rounding), None)

    @property
    def rounding(self) -> float:
        """The largest `introduced` that rounding alone can be expected to cause.

        The value is √d_mlp · eps + 4 · eps', where d_mlp is the length of the longest sum in a
        block, eps is the machine epsilon of float32 (or of float64 for a float64 model) in which
        sums are accumulated, and eps' is that of the model's dtype. A sum of n terms has a relative
        rounding error of about √n · eps (Higham and Mary 2019).
        """
        eps = EPSILONS[self.dtype]
        return sqrt(self.cfg.d_mlp) * min(eps, EPSILONS["float32"]) + 4 * eps

    @property
    def most_introduced(self) -> list[Change]:
        """The activations in which a new module introduced a change or NaN, the largest first."""
        sizes = {row: row.introduced for row in self.rows if row.introduced}
        return sorted(sizes, key=lambda row: (not isnan(sizes[row]), -sizes[row]))

    def __repr__(self) -> str:
        return f"Effect({'; '.join((in_one_line(self.swapped), *said(self)))})"

    def _repr_html_(self) -> str:
        return framed(render(self))


def total_map(report: Effect) -> HeatMap:
    """Return a heat map of the total change of each activation."""
    return heat_map({row.name: square(row, row.total) for row in report.rows})


def introduced_map(report: Effect) -> HeatMap:
    """Return a heat map of the changes that the new modules introduce in their activations."""
    return heat_map(
        {row.name: square(row, row.introduced) if row.module else None for row in report.rows}
    )


def square(change: Change, size: float | None) -> Square:
    """Return the square of a heat map for the activation that `change` describes.

    `size` is `change.total` or `change.introduced`, and determines the color of the square. If
    `size` is None, the square shows "×".
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


def notes(report: Effect) -> list[str]:
    """Return the notes (see `Change`) on the report's activations, without repetitions.

    Each text names the activations and the blocks with the same note, and then gives the note.
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


def render(report: Effect) -> str:
    """Return the report as an HTML page that works offline and needs no other file."""
    return render_page(
        "effect.html.jinja",
        report=report,
        sizes=SIZES,
        places=by_classes(report.swapped),
        parameters=by_parameters(report.swapped),
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
    for (old, new), paths in by_classes(report.swapped).items():
        say(f"swapped: {old} → {new} at {in_words(paths)}")
    for parameters, paths in by_parameters(report.swapped).items():
        say(f"parameters at {in_words(paths)}: {parameters}")
    say("", *said(report), "")
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


def said(report: Effect) -> tuple[str, str]:
    """Return two lines of text: how the predictions changed, and which activation changed first."""
    felt, first = report.impact, report.first_change
    return (
        f"output: {felt.top1_flips} of {felt.positions} top-1 predictions flipped, "
        f"KL divergence {felt.kl_divergence:.2g} nats, {felt.loss_in_words('+.2g')}",
        f"first changed: {first.name}, by {number(first.total or 0, 2)} of its size"
        if first
        else _only_rounding(report),
    )


def _only_rounding(report: Effect) -> str:
    largest = max((row.total or 0 for row in report.rows), default=0)
    if not largest:
        return "no activation changed"
    return f"no activation changed beyond rounding; the largest change is {number(largest, 2)}"


def _most_introduced(report: Effect) -> "rich.table.Table":
    from clean_transformer.reports.terminal import FoldingTable

    table = FoldingTable(
        "introduced most", "introduced", "inherited", "changed", box=None, padding=(0, 2, 0, 0)
    )
    for row in report.most_introduced[:LISTED]:
        sizes = (row.introduced or 0, row.inherited or 0, row.total or 0)
        table.add_row(row.name, *(number(size, 2) for size in sizes))
    return table
