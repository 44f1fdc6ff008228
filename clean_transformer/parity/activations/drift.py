"""Drift: the error that an activation has accumulated since the first layer.

The error is compared with the error that rounding alone causes (see `parity/rounding.py`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from clean_transformer.parity.verdict import Verdict


@dataclass(frozen=True)
class EndToEnd:
    """The drift of one activation.

    `error` is the root mean square of device − oracle. The oracle is the same model in float64 on
    the CPU. `envelope` is the root mean square of the change that random rounding causes in this
    activation. `healthy` is the largest `rho` that passes. `reference_error` is the root mean
    square error of the same activation in another implementation of GPT-2 (the reference), or None
    without a reference.
    """

    name: str
    error: float
    envelope: float
    healthy: float
    reference_error: float | None = None

    @property
    def rho(self) -> float:
        """ρ = error / envelope.

        If the envelope is 0, ρ is 0 for an error of 0, and infinite for any other error. ρ is also
        infinite if the error is infinite or NaN.
        """
        if not math.isfinite(self.error):
            return math.inf
        if self.envelope:
            return self.error / self.envelope
        return 0.0 if self.error == 0 else math.inf

    @property
    def verdict(self) -> Verdict:
        """WRONG if `error` is infinite or NaN; otherwise PASS or DEGRADED.

        PASS if `rho` is at most `healthy`. A finite drift is never WRONG. The isolated errors (see
        `Isolated`) show in which activation an error begins, and whether this error is WRONG.
        """
        if not math.isfinite(self.error):
            return Verdict.WRONG
        return Verdict.PASS if self.rho <= self.healthy else Verdict.DEGRADED


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of threads of PyTorch's CPU kernels to `count` inside a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
