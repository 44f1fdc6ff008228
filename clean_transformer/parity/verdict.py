"""The four verdicts, a single check, and the tolerance for "the same function"."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Verdict(str, Enum):
    """PASS, NOT CHECKED, DEGRADED, WRONG: from the best to the worst.

    The verdict of a run is the worst verdict of its checks.
    """

    PASS = "PASS"
    NOT_CHECKED = "NOT CHECKED"
    DEGRADED = "DEGRADED"
    WRONG = "WRONG"

    @property
    def severity(self) -> int:
        """0 for PASS, up to 3 for WRONG."""
        return [*Verdict].index(self)

    @property
    def exit_status(self) -> int:
        """0 for PASS, 3 for NOT CHECKED, 1 for the others. (2 says that a run was impossible.)"""
        return {Verdict.PASS: 0, Verdict.NOT_CHECKED: 3}.get(self, 1)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of the verdicts; NOT CHECKED where there are none."""
    return max(verdicts, key=lambda verdict: verdict.severity, default=Verdict.NOT_CHECKED)


@dataclass(frozen=True)
class Check:
    """One check: its verdict, the measured number, and the largest number that passes.

    `allowed` is None where the limit is not a single number.
    """

    name: str
    verdict: Verdict
    measured: float
    allowed: float | None = None
    note: str = ""


# In float64, models of the same function differ by about 1e-14 of an activation's scale, which is
# rounding. Models of different functions differ by at least 1e-8. The tolerance lies between.
SAME_FUNCTION = 1e-12
