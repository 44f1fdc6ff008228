"""Groups and sorts the rows of a report. The terminal and the page show the worst of each group."""

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
    """The value divided by the healthy limit."""
    if healthy:
        return value / healthy
    return 0.0 if value == 0 else math.inf


def concern(verdict: Verdict, value: float, healthy: float) -> tuple[int, float, float]:
    """A sort key that is larger for worse results: by verdict, then by `share`, then by value."""
    return verdict.severity, rank(share(value, healthy)), rank(value)


def worst_of(rows: Iterable[Isolated]) -> Isolated:
    """The worst row, by `concern`."""
    return max(rows, key=lambda row: concern(row.verdict, row.ratio, row.healthy))


def places(rows: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """The rows of question 1, grouped by block. In each group, the largest error comes first."""

    def error(row: Comparison) -> tuple[bool, float]:
        return bool(row.name), rank(row.error)

    groups = grouped(rows, lambda row: group_of(row.name or row.key))
    return {place: sorted(same, key=error, reverse=True) for place, same in groups.items()}


def kinds(rows: Iterable[Isolated]) -> dict[str, tuple[int, Isolated]]:
    """For each kind of operation: the number of its rows, and the worst row."""
    groups = grouped(rows, lambda row: row.operation)
    return {kind: (len(same), worst_of(same)) for kind, same in groups.items()}


def failed(checks: Iterable[Check]) -> list[Check]:
    """The checks that do not pass."""
    return [check for check in checks if check.verdict is not Verdict.PASS]


def worst_reference(run: DeviceRun) -> tuple[int, EndToEnd] | None:
    """The number of activations that the reference computes inaccurately, and the worst of them.

    None if the reference computes all activations accurately.
    """
    shares = [
        (rank(share(row.reference_error, row.healthy * row.envelope)), row)
        for row in run.end_to_end
        if row.reference_error is not None
    ]
    beyond = [(size, row) for size, row in shares if size > 1]
    return (len(beyond), max(beyond, key=lambda pair: pair[0])[1]) if beyond else None
