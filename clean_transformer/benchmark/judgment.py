"""Judges each goal: decides whether the goal is held, missed or not measured, and says why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clean_transformer.benchmark.goals import Goal
from clean_transformer.benchmark.results.data import Result, Results
from clean_transformer.benchmark.running.timing import Spread
from clean_transformer.benchmark.work import Part, format_value


@dataclass(frozen=True)
class Judged:
    """A goal, and the quotient that was measured for it.

    `measured` has the median and the quartiles of the quotient (see `Goal`). It is None if a value
    in the quotient was not measured. `note` says why the goal was missed or not measured.
    """

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
    """Compare the goal with the values in `results`, and return the judged goal."""
    parts = goal.over + goal.under
    found = results.together(parts)
    if found is None:
        return Judged(goal, None, f"{parts[0].work} is not in this run")
    for part in parts:
        if not found[part].values:
            return Judged(goal, None, f"{part.setup.contestant}: {found[part].why}")

    measured = quotient(goal.over, goal.under, found, goal.factor)
    held = goal.holds(measured.median)
    return Judged(goal, measured, "" if held else why_missed(goal, found))


def quotient(
    over: Sequence[Part], under: Sequence[Part], found: Mapping[Part, Result], factor: float = 1.0
) -> Spread:
    """Return the median and the quartiles of factor · product(over) / product(under).

    A part is a contestant and its work. For each part, `found` has one value per round of the
    measurement. One quotient is computed per round, because the machine's speed changes between
    rounds.
    """

    def products(parts: Sequence[Part]) -> list[float]:
        values = [found[part].values for part in parts]
        return [math.prod(together) for together in zip(*values, strict=True)]

    above = products(over)
    below = products(under) if under else [1.0] * len(above)
    return Spread.of([factor * a / b for a, b in zip(above, below, strict=True)])


def why_missed(goal: Goal, found: Mapping[Part, Result]) -> str:
    """Return the note for a missed goal. A goal is of one of these kinds:

    - The goal bounds how much faster our contestant is than another contestant. The note then says
      how much faster the contestant "limit" is than the other contestant. If our contestant ran in
      another dtype than float32, the note also says how much faster "limit" is in this dtype than
      in float32. If "limit" was not measured, the note is "".
    - The goal bounds how close our contestant comes to "limit". The note is "".
    - The goal bounds a measured value (`under` is empty). The note is "".
    - Any other goal. The note has the median of each value that the goal divides.
    """
    if not goal.under:
        return ""
    if len(goal.under) != 1 or goal.at_least is None:
        return " over ".join(
            " · ".join(format_value(found[part].spread.median, part.work) for part in parts)
            for parts in (goal.over, goal.under)
        )
    mine = goal.under[0]
    limit, in_float32 = (found.get(mine.by("limit", dtype)) for dtype in (None, "float32"))
    if limit is None or not limit.values or goal.over == (limit.part,):
        return ""
    allowed = quotient(goal.over, (limit.part,), found, goal.factor)
    note = f"the limit allows {goal.number(allowed.median)}"
    if in_float32 is None or not in_float32.values or in_float32 is limit:
        return note
    rate = quotient((in_float32.part,), (limit.part,), found)
    return f"{note}: here {mine.setup.dtype} is at most {rate.median:.2f} × as fast as float32"


def exit_status(judged: Sequence[Judged]) -> int:
    """Return the exit status of the command: 0 if all goals are held, 1 if a goal is missed.

    The status is 3 if no goal is missed, but a goal that is not optional was not measured.
    """
    if any(one.verdict == "MISSED" for one in judged):
        return 1
    return 3 if any(one.measured is None and not one.goal.optional for one in judged) else 0
