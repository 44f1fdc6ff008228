"""Whether the goals hold, and if not, why."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks._timing import Spread
from benchmarks.goals import Goal
from benchmarks.results import Results
from benchmarks.work import Part


@dataclass(frozen=True)
class Judged:
    """A goal and what was measured: None is NOT MEASURED, and never counts as held."""

    goal: Goal
    measured: Spread | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """HELD, MISSED or NOT MEASURED."""
        if self.measured is None:
            return "NOT MEASURED"
        return "HELD" if self.goal.holds(self.measured.median) else "MISSED"


def judge(goal: Goal, results: Results) -> Judged:
    """Compare a goal with what was measured, with the reason where that is not enough."""
    found = {part: results.of(part) for part in goal.over + goal.under}
    missing = [part for part, result in found.items() if result is None]
    if missing:
        return Judged(goal, None, why_missing(missing[0], results))
    rounds = min(len(result.values) for result in found.values() if result)

    def product(parts: Sequence[Part], number: int) -> float:
        return math.prod(found[part].values[number] for part in parts)  # type: ignore[union-attr]

    quotients = [
        goal.factor * product(goal.over, number) / product(goal.under, number)
        for number in range(rounds)
    ]
    measured = Spread.of(quotients)
    return Judged(goal, measured, "" if goal.holds(measured.median) else why_missed(goal, results))


def why_missing(part: Part, results: Results) -> str:
    """Why there is no value of that part."""
    for result in results.results:
        if result.part == part:
            return f"{part.entrant.contestant}: {result.why}"
    return f"{part.entrant} took no part in {part.work}"


def why_missed(goal: Goal, results: Results) -> str:
    """What the machine's own limit would have allowed for a speed-up, where it was measured."""
    if len(goal.under) != 1 or goal.at_least is None:
        return ""
    [mine], limit = goal.under, results.of(goal.under[0].by("limit"))
    if limit is None or goal.over == (limit.part,):
        return ""
    peers = [results.of(part) for part in goal.over]
    allowed = goal.factor * math.prod(p.spread.median for p in peers if p) / limit.spread.median
    said = f"at the machine's limit for {mine.entrant.dtype} it were {goal.number(allowed)}"
    whole = results.of(mine.by("limit", "float32"))
    if whole is not None and mine.entrant.dtype != "float32":
        rate = whole.spread.median / limit.spread.median
        said += f", which is {rate:.2f} × as fast here as for float32"
    return said
