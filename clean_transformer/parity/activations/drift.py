"""Measures drift: the total error of an activation, which adds up from the first layer on."""

import math
from dataclasses import dataclass

from clean_transformer.parity.verdict import Verdict


@dataclass(frozen=True)
class EndToEnd:
    """The drift of one activation: its total error, with the errors of all earlier layers.

    `error` is the root mean square error of the device, compared with the same model in float64 on
    the CPU. `envelope` is the root mean square of the change that random rounding causes in this
    activation (see `parity/rounding.py`). `healthy` is the largest ratio `rho` = error / envelope
    that passes. `reference_error` is the root mean square error of another implementation of GPT-2
    on the CPU, or None if no other implementation ran.
    """

    name: str
    error: float
    envelope: float
    healthy: float
    reference_error: float | None = None

    @property
    def rho(self) -> float:
        """The ratio ρ = error / envelope.

        If both numbers are 0, ρ is 0. If only the envelope is 0, or if the error is infinite or
        NaN, ρ is infinite.
        """
        if not math.isfinite(self.error):
            return math.inf
        if self.envelope:
            return self.error / self.envelope
        return 0.0 if self.error == 0 else math.inf

    @property
    def verdict(self) -> Verdict:
        """WRONG if `error` is infinite or NaN, PASS if `rho` ≤ `healthy`, otherwise DEGRADED."""
        # A finite drift is never WRONG: it does not show in which activation an error begins.
        if not math.isfinite(self.error):
            return Verdict.WRONG
        return Verdict.PASS if self.rho <= self.healthy else Verdict.DEGRADED
