"""One statement about a device that was tried."""

from dataclasses import dataclass

from clean_transformer.parity.verdict import Verdict


@dataclass(frozen=True)
class Check:
    """What was measured, what was allowed (where that is one number), and the conclusion."""

    name: str
    verdict: Verdict
    measured: float
    allowed: float | None = None
    note: str = ""
