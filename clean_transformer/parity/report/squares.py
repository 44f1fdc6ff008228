"""Computes the heat maps of a run, with one square for each activation.

The color of a square shows the activation's error, divided by the largest error that passes.
"""

import math

from clean_transformer.analysis.comparison import LOGITS
from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.report.summary import concern, share, worst_of
from clean_transformer.parity.report.wording import worst_head
from clean_transformer.parity.results import DeviceRun, by_activation
from clean_transformer.parity.verdict import Verdict
from clean_transformer.reports.heat_map import HeatMap, Square, heat_map, shade
from clean_transformer.reports.page import number

# A share is an error divided by the largest error that passes. A square has one of 12 shades: the
# smallest i for which the share is at most SHARES[i]. An error that passes has a share of at most
# 1, which is one of the shades 0 to 7.
SHARES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 8.0, 64.0, 512.0, math.inf)

STYLES = {
    Verdict.PASS: "green",
    Verdict.NOT_CHECKED: "cyan",
    Verdict.ERROR: "magenta",
    Verdict.DEGRADED: "yellow",
    Verdict.WRONG: "bold red",
}

MARKS = {
    Verdict.PASS: "",
    Verdict.NOT_CHECKED: "?",
    Verdict.ERROR: "E",
    Verdict.DEGRADED: "D",
    Verdict.WRONG: "W",
}


def isolated_map(run: DeviceRun) -> HeatMap:
    """Return a heat map of the error that the device makes in each activation.

    If an activation was checked several times, its square shows the worst result.
    """
    rows = by_activation(run.isolated)
    return heat_map({name or LOGITS: isolated_square(worst_of(rows[name])) for name in rows})


def end_to_end_map(run: DeviceRun) -> HeatMap:
    """Return a heat map of drift: the total error of each activation since the first layer."""
    return heat_map({row.name: end_to_end_square(row) for row in run.end_to_end})


def isolated_square(row: Isolated) -> Square:
    """Return the colored square of the heat map for one activation's own error (see `Isolated`)."""
    facts = {
        "name": row.name or LOGITS,
        "verdict": row.verdict.value,
        "operation": row.operation,
        "ratio": number(row.ratio, 4),
        "healthy": number(row.healthy, 4),
        "bits": number(row.bits, 4),
        "case": row.case,
        "path": row.path,
        "index": ", ".join(map(str, row.worst_index)),
        "head": worst_head(row),
        "precision": row.lower_precision,
    }
    return _square(facts, row.verdict, row.ratio, row.healthy)


def end_to_end_square(row: EndToEnd) -> Square:
    """Return the square for the drift of one activation: the total error since the first layer."""
    theirs = row.reference_error
    facts = {
        "name": row.name,
        "verdict": row.verdict.value,
        "rho": number(row.rho, 4),
        "healthy": number(row.healthy, 4),
        "error": number(row.error, 4),
        "envelope": number(row.envelope, 4),
        "reference": "" if theirs is None else number(theirs, 4),
    }
    return _square(facts, row.verdict, row.rho, row.healthy)


def _square(facts: dict[str, str], verdict: Verdict, value: float, healthy: float) -> Square:
    return Square(
        facts=facts,
        label=number(value, 2),
        concern=concern(verdict, value, healthy),
        shade=shade(share(value, healthy), SHARES),
        bar="·",
        style=STYLES[verdict],
        mark=MARKS[verdict],
    )
