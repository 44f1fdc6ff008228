"""Groups and sorts the rows of a report, and finds the worst row of a group.

The report in the terminal and the report on the HTML page use these functions.
"""

import math
from collections.abc import Iterable

from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.report.wording import group_of
from clean_transformer.parity.results import DeviceRun, grouped
from clean_transformer.parity.same_function import Comparison
from clean_transformer.parity.verdict import Check, Verdict
from clean_transformer.reports.heat_map import rank


def share(value: float, healthy: float) -> float:
    """Return `value / healthy`. If `healthy` is 0: 0 if `value` is 0 too, otherwise infinity."""
    if healthy:
        return value / healthy
    return 0.0 if value == 0 else math.inf


def concern(verdict: Verdict, value: float, healthy: float) -> tuple[int, float, float]:
    """Return a sort key that is larger for a worse result.

    Sorting by this key compares the verdicts first. Equal verdicts are compared by
    `share(value, healthy)`, and equal shares by `value`. NaN counts as infinity.
    """
    return verdict.severity, rank(share(value, healthy)), rank(value)


def worst_of(rows: Iterable[Isolated]) -> Isolated:
    """Return the row with the largest `concern`."""
    return max(rows, key=lambda row: concern(row.verdict, row.ratio, row.healthy))


def places(rows: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """Group the rows of question 1 by block. The keys are the results of `group_of`.

    The rows of each group are sorted by error, and the row with the largest error comes first.
    Rows that are NOT CHECKED come after all other rows of their group.
    """

    def error(row: Comparison) -> tuple[bool, float]:
        return bool(row.name), rank(row.error)

    groups = grouped(rows, lambda row: group_of(row.name or row.key))
    return {place: sorted(same, key=error, reverse=True) for place, same in groups.items()}


def kinds(rows: Iterable[Isolated]) -> dict[str, tuple[int, Isolated]]:
    """Return a pair (number of rows, worst row) for each kind of operation.

    The keys are the kinds: the `operation` of the rows, such as "linear".
    """
    groups = grouped(rows, lambda row: row.operation)
    return {kind: (len(same), worst_of(same)) for kind, same in groups.items()}


def failed(checks: Iterable[Check]) -> list[Check]:
    """Return the checks whose verdict is not PASS."""
    return [check for check in checks if check.verdict is not Verdict.PASS]


def worst_reference(run: DeviceRun) -> tuple[int, EndToEnd] | None:
    """Find the activations whose `reference_error` is above the largest healthy error.

    The largest healthy error of an activation is `healthy` · `envelope`. Returns the number of
    activations found, and the row in which `reference_error` exceeds this limit by the largest
    factor. Returns None if no activation is found.
    """
    shares = [
        (rank(share(row.reference_error, row.healthy * row.envelope)), row)
        for row in run.end_to_end
        if row.reference_error is not None
    ]
    beyond = [(size, row) for size, row in shares if size > 1]
    return (len(beyond), max(beyond, key=lambda pair: pair[0])[1]) if beyond else None
