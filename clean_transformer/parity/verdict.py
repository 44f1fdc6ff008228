"""The four verdicts, the result of a check, and the tolerance for "the same function"."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Verdict(str, Enum):
    """The possible verdicts, from the best (PASS) to the worst (WRONG).

    DEGRADED means that the device is less accurate than a healthy device. WRONG means that rounding
    cannot explain the error. ERROR means that the check ended with an exception. The verdict of a
    run is the worst verdict of its checks.
    """

    PASS = "PASS"
    NOT_CHECKED = "NOT CHECKED"
    ERROR = "ERROR"
    DEGRADED = "DEGRADED"
    WRONG = "WRONG"

    @property
    def severity(self) -> int:
        """The verdict as a number to sort by, from 0 for PASS to 4 for WRONG."""
        return [*Verdict].index(self)

    @property
    def exit_status(self) -> int:
        """The exit status of the command: 0 for PASS, 3 for NOT CHECKED, 2 for ERROR, 1 for others.

        Exit status 2 also means that the command could not run at all.
        """
        return {Verdict.PASS: 0, Verdict.NOT_CHECKED: 3, Verdict.ERROR: 2}.get(self, 1)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of the verdicts; NOT CHECKED if there are no verdicts."""
    return max(verdicts, key=lambda verdict: verdict.severity, default=Verdict.NOT_CHECKED)


@dataclass(frozen=True)
class Check:
    """The result of one check.

    `measured` is the measured number, and `allowed` the largest number that passes; `allowed` is
    None if the limit is not a single number. `note` explains the result.
    """

    name: str
    verdict: Verdict
    measured: float
    allowed: float | None = None
    note: str = ""


# In float64, two models that compute the same function differ by about 1e-14 of an activation's
# scale, because of rounding. Two different functions differ by at least 1e-8. The tolerance lies
# between these numbers.
SAME_FUNCTION = 1e-12
