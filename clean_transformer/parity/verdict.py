"""The verdicts, the result of a check, and the tolerance for comparisons in float64."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Verdict(str, Enum):
    """The possible verdicts, from the best (PASS) to the worst (WRONG).

    NOT CHECKED means that the user asked for a check that was not possible, for example on a device
    that this machine does not have. ERROR means that a check raised an exception. DEGRADED means
    that the device is less accurate than a healthy device. WRONG means that rounding cannot explain
    the error. The verdict of a run is the worst verdict of its checks.
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
        """The exit status of the command: 0 PASS, 3 NOT CHECKED, 2 ERROR, 1 DEGRADED or WRONG.

        The command also exits with status 2 if it could not run at all.
        """
        return {Verdict.PASS: 0, Verdict.NOT_CHECKED: 3, Verdict.ERROR: 2}.get(self, 1)

    @property
    def is_bad(self) -> bool:
        """Whether the check found a fault: the verdict is DEGRADED or WRONG."""
        return self in (Verdict.DEGRADED, Verdict.WRONG)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of the verdicts; NOT CHECKED if there are no verdicts."""
    return max(verdicts, key=lambda verdict: verdict.severity, default=Verdict.NOT_CHECKED)


@dataclass(frozen=True)
class Check:
    """The result of one check.

    `measured` is the measured number, or None if nothing could be measured. `allowed` is the
    largest number that passes, or None if the limit is not a single number. `note` explains the
    result.
    """

    name: str
    verdict: Verdict
    measured: float | None = None
    allowed: float | None = None
    note: str = ""


# In float64, two models that compute the same function differ by about 1e-14 of an activation's
# scale, because of rounding. Two different functions differ by at least 1e-8. The tolerance lies
# between these numbers.
SAME_FUNCTION = 1e-12
