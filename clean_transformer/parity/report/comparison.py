"""Compares two parity reports, to find which results got worse or better.

A report is a dictionary that `read_json` returns. Errors also differ a little between two healthy
runs, because the order of sums differs, and other random blocks and positions are checked.
Therefore an error counts as changed only if it changes by more than BITS bits.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clean_transformer.analysis.comparison import LOGITS
from clean_transformer.parity.verdict import Verdict, worst
from clean_transformer.reports.environment import differences

# An error counts as changed if the effective precision changes by more than BITS bits, or the
# largest error ratio by more than a factor of 2^BITS. A ratio below 1 counts as 1, because such an
# error is less than one rounding. Between ten healthy runs with different numbers of threads,
# instruction sets and random blocks, we measured at most 2.5 bits and a factor of 4.3 = 2^2.1.
BITS = 4.0
NOT_RUN = (Verdict.NOT_CHECKED, Verdict.ERROR)

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Identifies a result in a report, so that the same result is found in another report.

    `run` is the device, the dtype and, unless it is "eager", the mode. `what` is the kind of
    result: "run", "use", "activation", "drift", "invariant", "single operation" or "same function".
    `where` names the use, the activation or the check. `operation` is the kind of operation, such
    as "linear", or empty.
    """

    run: str
    what: str
    where: str = ""
    operation: str = ""


@dataclass(frozen=True)
class Measured:
    """The verdict and the error of one result in one report.

    `ratio` is the largest error, in units of one rounding. `bits` is the lowest effective precision
    (see `Isolated`). For drift (see `EndToEnd`), `ratio` is the error divided by that of random
    rounding, and `bits` is NaN. If only the verdict is compared, both are NaN.
    """

    verdict: Verdict
    ratio: float = math.nan
    bits: float = math.nan


@dataclass(frozen=True)
class Change:
    """One result (`place`) in the old report (`before`) and in the new report (`after`)."""

    place: Place
    before: Measured
    after: Measured

    @property
    def verdict(self) -> str:
        """Whether the new result is "worse" than the old result, "better" or "the same".

        If the two verdicts are equal, the errors are compared, and a change of more than BITS bits
        counts. A result that was checked before and is not checked now is worse, even if it was
        WRONG before.
        """
        lost = self.before.verdict not in NOT_RUN and self.after.verdict in NOT_RUN
        step = 1 if lost else self.after.verdict.severity - self.before.verdict.severity
        if step == 0:
            step += self.growth > 2**BITS or self.lost_bits > BITS
            step -= self.growth < 2**-BITS or self.lost_bits < -BITS
        return "worse" if step > 0 else "better" if step < 0 else "the same"

    @property
    def growth(self) -> float:
        """The factor by which the error ratio grew: max(1, new ratio) / max(1, old ratio).

        The factor is 1 if both ratios are infinite, or if only the verdicts are compared.
        """
        old, new = max(1.0, self.before.ratio), max(1.0, self.after.ratio)
        return 1.0 if old == new else new / old

    @property
    def lost_bits(self) -> float:
        """The old effective precision minus the new effective precision, in bits.

        The result is 0 if both ratios are at most 1, or if a report has no effective precision for
        this result.
        """
        lost = self.before.bits - self.after.bits
        is_error = max(self.before.ratio, self.after.ratio) > 1
        return lost if is_error and math.isfinite(lost) else 0.0


@dataclass(frozen=True)
class Comparison:
    """The comparison of two reports.

    `build` has a tuple (key, old value, new value) for each difference in versions, processor or
    settings. Each text in `not_compared` says what could not be compared. `changes` has a `Change`
    for each result that is in both reports, even if it did not change. Results that neither report
    could check are left out.
    """

    build: list[tuple[str, str, str]]
    not_compared: list[str]
    changes: list[Change]

    def those(self, verdict: str) -> list[Change]:
        """The changes whose `Change.verdict` is the given one, such as "worse".

        Changes without an error come first. The others are sorted by the factor by which the error
        grew, the largest factor first.
        """
        found = [change for change in self.changes if change.verdict == verdict]
        return sorted(found, key=lambda one: (not math.isnan(one.after.ratio), -one.growth))


def compare_reports(before: Json, after: Json) -> Comparison:
    """Compare two reports of `clean-transformer parity` or `clean-transformer doctor`.

    If the models of the reports differ in weights or architecture, only the verdicts are compared.
    Raises `ValueError` if no result can be compared.
    """
    same_model = all(before[key] == after[key] for key in ("weights", "cfg"))
    old, new = ({**_results(report, with_errors=same_model)} for report in (before, after))
    not_compared = []
    if not same_model:
        not_compared.append(
            f"errors, only verdicts: the models differ ({before['weights']}; {after['weights']})"
        )
    for one, other, which in ((old, new, "first"), (new, old, "second")):
        runs = {place.run for place in other}
        lone = dict.fromkeys(place.run for place in one if place.run not in runs)
        not_compared += [f"{run}: only the {which} report has it" for run in lone]
        count = Counter(p.run for p in one if p not in other and p.run in runs)
        not_compared += [
            f"{run}: {n} result{'s' * (n != 1)} that only the {which} report has"
            for run, n in count.items()
        ]
    changes = [Change(place, old[place], new[place]) for place in old if place in new]
    changes = [one for one in changes if {one.before.verdict, one.after.verdict} - {*NOT_RUN}]
    if not changes:
        raise ValueError(f"the reports have no result in common; {'; '.join(not_compared)}")
    return Comparison(_build_differences(before, after), not_compared, changes)


def _results(report: Json, with_errors: bool) -> dict[Place, Measured]:
    found: dict[Place, Measured] = {}

    def add(place: Place, verdict: str, ratio: Any = math.nan, bits: Any = math.nan) -> None:
        # Several results can have the same place, such as the random blocks that a use judges. They
        # are merged into one result: the worst verdict, the largest ratio and the fewest bits.
        new = Measured(Verdict(verdict), _number(ratio), _number(bits))
        old = found.get(place, new)
        found[place] = Measured(
            worst((old.verdict, new.verdict)),
            max(old.ratio, new.ratio),
            min(old.bits, new.bits),
        )

    same = report["same_function"]
    add(Place("float64", "same function"), same["verdict"] if same else Verdict.NOT_CHECKED)
    for run in report["runs"]:
        name = _name(run)
        add(Place(name, "run"), run["verdict"])
        for use in run["by_use"]:
            add(Place(name, "use", use["name"]), use["verdict"])
        for check in run["invariants"]:
            add(Place(name, "invariant", check["name"]), check["verdict"])
        if not with_errors:
            continue
        for row in run["isolated"]:
            where = f"{row['name'] or LOGITS}, {row['case']}, {row['path']}"
            place = Place(name, "activation", where, row["operation"])
            add(place, row["verdict"], row["ratio"], row["bits"])
        for row in (row for use in run["uses"] for row in use["rows"]):
            place = Place(name, "use", row.get("case", row["name"]), row.get("operation", ""))
            add(place, row["verdict"], row.get("ratio", row.get("measured")), row.get("bits"))
        for row in run["end_to_end"]:
            add(Place(name, "drift", row["name"]), row["verdict"], row["rho"])
        for check in run["probes"]:
            add(Place(name, "single operation", check["name"]), check["verdict"], check["measured"])
    return found


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def _name(run: Json) -> str:
    mode = "" if run["mode"] == "eager" else f", {run['mode']}"
    return f"{run['device']} {run['dtype']}{mode}"


def _build_differences(before: Json, after: Json) -> list[tuple[str, str, str]]:
    found = differences(before["environment"], after["environment"])
    old, new = ({_name(run): run["settings"] for run in one["runs"]} for one in (before, after))
    for name in old:
        if old[name] and new.get(name):
            found += differences(old[name], new[name])
    return [*dict.fromkeys(found)]
