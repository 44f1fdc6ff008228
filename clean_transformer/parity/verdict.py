"""What a check may conclude."""

from collections.abc import Iterable
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
