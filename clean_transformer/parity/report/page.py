"""The report as one page that needs nothing else: no network, no other file."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from clean_transformer.parity.report.json import to_json
from clean_transformer.parity.report.terminal import MARKS
from clean_transformer.parity.report.wording import PRECISION_SETTINGS, group_of
from clean_transformer.parity.results import SuiteReport
from clean_transformer.parity.verdict import Verdict, worst
from clean_transformer.reports.heat_map import heat_map
from clean_transformer.reports.page import number, render_page
from clean_transformer.support.files import write_atomically

Row = Mapping[str, Any]


Key = TypeVar("Key")


# A square's color: the first of these that its error, as a share of the healthy, does not exceed.
SHARES = (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 8, 64, 512, math.inf)


MEANING = {
    Verdict.PASS: (
        "GPT-2 is computed correctly.",
        "The model is the same function as its reference, and every device and dtype below "
        "computes it as accurately as its numbers allow.",
    ),
    Verdict.NOT_CHECKED: (
        "Nothing wrong was found, but not everything was checked.",
        "What was checked passed. What follows was not, and may be right or wrong.",
    ),
    Verdict.DEGRADED: (
        "GPT-2 is computed less accurately than it should be.",
        "The errors are larger than a healthy device has, or those of a lower precision.",
    ),
    Verdict.WRONG: (
        "GPT-2 is computed wrongly.",
        "Some errors are larger than any order of rounding explains: do not trust these results.",
    ),
}


@dataclass(frozen=True)
class Cell:
    """A square of a heat map: its shade is an index of `SHARES`, its facts are told on hover."""

    verdict: Verdict
    value: float
    share: float
    facts: dict[str, str]

    @property
    def shade(self) -> int:
        """0 where the error is exactly zero, 7 at the most where it is healthy."""
        return len(SHARES) - 1 if math.isnan(self.share) else bisect_left(SHARES, self.share)

    @property
    def label(self) -> str:
        """The value, to read."""
        return number(self.value, 2)

    @property
    def mark(self) -> str:
        """A letter for what does not pass, so that it is not told by color alone."""
        return "" if self.verdict is Verdict.PASS else MARKS[self.verdict]

    @property
    def concern(self) -> tuple[int, float, float]:
        """The larger, the worse."""
        share = math.inf if math.isnan(self.share) else self.share
        return [*Verdict].index(self.verdict), share, self.value


@dataclass(frozen=True)
class Curve:
    """One line of the chart."""

    label: str
    style: str
    values: list[float]


@dataclass(frozen=True)
class Chart:
    """The residual stream's error through depth, on a log axis, in the units of an SVG."""

    names: list[str]
    curves: list[Curve]
    allowed: list[float]
    decades: range
    width: int = 1060
    height: int = 300
    left: int = 52
    top: int = 10
    bottom: int = 38

    @property
    def step(self) -> float:
        """The width of one activation."""
        return (self.width - self.left) / len(self.names)

    def x(self, index: int | float) -> float:
        """The middle of an activation."""
        return self.left + (index + 0.5) * self.step

    def y(self, value: float) -> float:
        """Zero is drawn at the lower edge, what is no number at the upper one."""
        low, high = self.decades[0], self.decades[-1]
        depth = low if value == 0 else high if math.isnan(value) else math.log10(value)
        share = (min(max(depth, low), high) - low) / (high - low)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def line(self, values: Iterable[float]) -> str:
        """The points of a polyline."""
        return " ".join(f"{self.x(i):.1f},{self.y(value):.1f}" for i, value in enumerate(values))


def write_html(report: SuiteReport, file: Path) -> None:
    """Write the report as a page, whole or not at all."""
    write_atomically(file, render(to_json(report)))


def render(report: Row) -> str:
    """The page of a report's plain values, as `to_json` gives them."""
    return render_page(
        "parity.html.jinja",
        report=report,
        meaning=MEANING[Verdict(report["verdict"])],
        shares=SHARES,
        reasons=reasons(report),
        places=places,
        kinds=kinds,
        title=title,
        worst_verdict=worst_verdict,
        precision_settings=PRECISION_SETTINGS,
        first_failure=first_failure,
        worst_reference=worst_reference,
        teacher_forced=lambda run: heat_map(by_name(run["isolated"], isolated_cell)),
        end_to_end=lambda run: heat_map(by_name(run["end_to_end"], end_to_end_cell)),
        depth_chart=depth_chart,
    )


def worst_verdict(rows: Iterable[Row]) -> str:
    """The worst of the rows' verdicts."""
    return worst(Verdict(row["verdict"]) for row in rows).value


def title(name: str) -> str:
    """The model's own output has no name."""
    return name or "logits"


def reasons(report: Row) -> list[tuple[str, str, str, str]]:
    """What does not pass: a link to it, what it is, its verdict, and why."""
    found = []
    same = report["same_function"]
    if same is None:
        found.append(("same-function", "the same function", "NOT CHECKED", report["no_reference"]))
    elif same["verdict"] != "PASS":
        bad = [row for row in same["rows"] if row["verdict"] == same["verdict"]]
        why = f"{len(bad)} of {len(same['rows'])} activations, first {bad[0]['key']}"
        found.append(("same-function", "the same function", same["verdict"], why))
    for index, run in enumerate(report["runs"], 1):
        if run["verdict"] != "PASS":
            name = run_name(run)
            found.append((f"run-{index}", name, run["verdict"], _why(run)))
    return found


def _why(run: Row) -> str:
    failed = first_failure(run)
    if failed:
        return f"first at {title(failed.facts['name'])}"
    for part, says in (("end_to_end", "drifts end to end, first at"), ("invariants", "breaks")):
        for row in run[part]:
            if row["verdict"] != "PASS":
                return f"{says} {row['name']}"
    for row in run["probes"]:
        if row["verdict"] != "PASS":
            return f"wrong in single operations, first {row['name']}"
    return run["not_checked"]


def run_name(run: Row) -> str:
    """Where and how a run was made."""
    how = "" if run["mode"] == "eager" else f", {run['mode']}"
    return f"{run['device']} {run['dtype']}{how}"


def first_failure(run: Row) -> Cell | None:
    """The first activation, in the order of the forward pass, that does not pass."""
    for cell in by_name(run["isolated"], isolated_cell).values():
        if cell.verdict is not Verdict.PASS:
            return cell
    return None


def places(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Question 1's rows, by the block that they are in, the worst of each first."""

    def concern(row: Row) -> tuple[bool, float]:
        error = float(row["error"])
        return bool(row["name"]), math.inf if math.isnan(error) else error

    groups = _grouped(rows, lambda row: group_of(row["name"] or row["key"]))
    return {place: sorted(same, key=concern, reverse=True) for place, same in groups.items()}


def kinds(run: Row) -> dict[str, tuple[int, Cell]]:
    """Every kind of operation: how many activations, and the worst of them."""
    groups = _grouped(run["isolated"], lambda row: row["operation"])
    return {kind: (len(rows), isolated_cell(rows)) for kind, rows in groups.items()}


def _grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def worst_reference(run: Row) -> tuple[int, Row] | None:
    """How many activations the reference itself computes less accurately than is healthy, and
    the one where it is furthest from the oracle."""

    def share(row: Row) -> float:
        return _share(float(row["reference_error"]), row["healthy"] * float(row["envelope"]))

    compared = [row for row in run["end_to_end"] if row["reference_error"] is not None]
    beyond = [row for row in compared if not share(row) <= 1]
    return (len(beyond), max(beyond, key=share)) if beyond else None


def isolated_cell(rows: list[Row]) -> Cell:
    """The worst of an activation's teacher-forced rows, over cases and paths."""
    return max((_isolated_cell(row) for row in rows), key=lambda cell: cell.concern)


def _isolated_cell(row: Row) -> Cell:
    ratio, healthy = float(row["ratio"]), float(row["healthy"])
    heads = [head for head, largest in enumerate(row["per_head"]) if largest == row["ratio"]]
    facts = {
        "name": row["name"],
        "verdict": row["verdict"],
        "operation": row["operation"],
        "ratio": number(ratio, 4),
        "healthy": number(healthy, 4),
        "bits": number(row["bits"], 4),
        "case": row["case"],
        "path": row["path"],
        "index": ", ".join(map(str, row["worst_index"])),
        "head": str(heads[0]) if heads else "",
        "precision": row["lower_precision"],
    }
    return Cell(Verdict(row["verdict"]), ratio, _share(ratio, healthy), facts)


def end_to_end_cell(rows: list[Row]) -> Cell:
    """What has gathered in one activation."""
    (row,) = rows
    rho, theirs = float(row["rho"]), row["reference_error"]
    facts = {
        "name": row["name"],
        "verdict": row["verdict"],
        "rho": number(rho, 4),
        "healthy": number(row["healthy"], 4),
        "error": number(row["error"], 4),
        "envelope": number(row["envelope"], 4),
        "reference": "" if theirs is None else number(theirs, 4),
    }
    return Cell(Verdict(row["verdict"]), rho, _share(rho, row["healthy"]), facts)


def _share(value: float, healthy: float) -> float:
    if healthy:
        return value / healthy
    return 0.0 if value == 0 else math.inf


def by_name(rows: Iterable[Row], cell: Callable[[list[Row]], Cell]) -> dict[str, Cell]:
    """The cell of each activation, in the order of the forward pass.

    Every run of the suite tells a part of that order: the one that watched the most goes first.
    """
    runs = _grouped(rows, lambda row: (row.get("case"), row.get("path")))
    longest_first = sorted(runs.values(), key=len, reverse=True)
    groups = _grouped(chain.from_iterable(longest_first), lambda row: row["name"])
    return {name: cell(same) for name, same in groups.items()}


def depth_chart(run: Row) -> Chart | None:
    """The residual stream's error, where there is one to draw."""
    residual = [row for row in run["end_to_end"] if ".hook_resid_" in row["name"]]
    curves = [
        Curve("this device", "ours", [float(row["error"]) for row in residual]),
        Curve("CPU envelope", "envelope", [float(row["envelope"]) for row in residual]),
    ]
    if residual and all(row["reference_error"] is not None for row in residual):
        theirs = [float(row["reference_error"]) for row in residual]
        curves.append(Curve("the reference itself", "reference", theirs))
    allowed = [float(row["envelope"]) * row["healthy"] for row in residual]
    drawn = [value for curve in curves for value in curve.values] + allowed
    logs = [math.log10(value) for value in drawn if 0 < value < math.inf]
    if not logs:
        return None
    low = math.floor(min(logs))
    decades = range(low, max(math.ceil(max(logs)), low + 1) + 1)
    return Chart([row["name"] for row in residual], curves, allowed, decades)
