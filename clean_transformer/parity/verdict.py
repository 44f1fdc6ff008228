"""What a check may conclude."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Verdict(str, Enum):
    """From the best to the worst: a run is as good as the worst of its checks."""

    PASS = "PASS"
    NOT_CHECKED = "NOT CHECKED"
    DEGRADED = "DEGRADED"
    WRONG = "WRONG"

    @property
    def exit_status(self) -> int:
        """0 for PASS, 3 for NOT CHECKED, 1 otherwise (2 is for a run that could not be made)."""
        return {Verdict.PASS: 0, Verdict.NOT_CHECKED: 3}.get(self, 1)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of the verdicts; NOT CHECKED if there is none."""
    return max(verdicts, key=[*Verdict].index, default=Verdict.NOT_CHECKED)


@dataclass(frozen=True)
class Check:
    """What was measured, what was allowed (where that is one number), and the conclusion."""

    name: str
    verdict: Verdict
    measured: float
    allowed: float | None = None
    note: str = ""


# In float64 rounding leaves about 1e-14 of an activation's scale, and a different formula at least
# 1e-8: a tolerance between them tells the two apart.
SAME_FUNCTION = 1e-12
