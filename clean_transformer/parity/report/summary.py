"""Groups and sorts the results in a parity report, and finds the worst result of a group."""

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
    """Return `value / healthy`, where 0 / 0 gives 0, and any other number / 0 gives infinity."""
    if healthy:
        return value / healthy
    return 0.0 if value == 0 else math.inf


def concern(verdict: Verdict, value: float, healthy: float) -> tuple[int, float, float]:
    """Return a sort key: (severity of the verdict, `value / healthy`, `value`).

    A worse result has a larger key. NaN counts as infinity.
    """
    return verdict.severity, rank(share(value, healthy)), rank(value)


def worst_of(rows: Iterable[Isolated]) -> Isolated:
    """Return the worst result: the result with the largest sort key `concern`."""
    return max(rows, key=lambda row: concern(row.verdict, row.ratio, row.healthy))


def places(rows: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """Group comparisons with another implementation of GPT-2 by block (see `group_of`).

    In each group, the row with the largest error comes first. Rows that are NOT CHECKED come last.
    """

    def error(row: Comparison) -> tuple[bool, float]:
        return bool(row.name), rank(row.error)

    groups = grouped(rows, lambda row: group_of(row.name or row.key))
    return {place: sorted(same, key=error, reverse=True) for place, same in groups.items()}


def kinds(rows: Iterable[Isolated]) -> dict[str, tuple[int, Isolated]]:
    """Return (number of rows, row with the worst result) for each kind of operation."""
    groups = grouped(rows, lambda row: row.operation)
    return {kind: (len(same), worst_of(same)) for kind, same in groups.items()}


def failed(checks: Iterable[Check]) -> list[Check]:
    """Return the checks whose verdict is not PASS."""
    return [check for check in checks if check.verdict is not Verdict.PASS]


def worst_reference(run: DeviceRun) -> tuple[int, EndToEnd] | None:
    """Find the activations in which another implementation of GPT-2 has too large an error.

    The limit is `healthy` · `envelope`, the same as for our model (see `EndToEnd`). Returns the
    number of activations whose error is above the limit, and the `EndToEnd` of the activation whose
    error is the largest multiple of its limit. Returns None if there are no such activations.
    """
    shares = [
        (rank(share(row.reference_error, row.healthy * row.envelope)), row)
        for row in run.end_to_end
        if row.reference_error is not None
    ]
    beyond = [(size, row) for size, row in shares if size > 1]
    return (len(beyond), max(beyond, key=lambda pair: pair[0])[1]) if beyond else None
