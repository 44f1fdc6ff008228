"""Measures drift: the error that an activation has accumulated since the first layer.

The error is compared with the errors of healthy runs on the CPU.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.analysis.comparison import LOGITS, rms_errors, run
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.verdict import Verdict
from clean_transformer.reports.heat_map import rank


@dataclass(frozen=True)
class EndToEnd:
    """The drift of one activation.

    `error` is the root mean square of device − oracle. `envelope` is the largest root mean square
    error of this activation in the healthy runs, which are on the CPU in the same dtype (see
    `healthy_envelope`). `healthy` is the largest `rho` that passes. `reference_error` is the root
    mean square error of this activation when the reference computes it, or None.
    """

    name: str
    error: float
    envelope: float
    healthy: float
    reference_error: float | None = None

    @property
    def rho(self) -> float:
        """ρ = error / envelope. If the envelope is 0: 0 if the error is 0 too, else infinity.

        ρ is also infinite if the error is infinite or NaN.
        """
        if not math.isfinite(self.error):
            return math.inf
        if self.envelope:
            return self.error / self.envelope
        return 0.0 if self.error == 0 else math.inf

    @property
    def verdict(self) -> Verdict:
        """PASS or DEGRADED; WRONG only for an infinite or NaN `error`.

        A finite drift is never WRONG. The isolated errors (see `Isolated`) show in which activation
        an error begins, and whether this error is WRONG.
        """
        if not math.isfinite(self.error):
            return Verdict.WRONG
        return Verdict.PASS if self.rho <= self.healthy else Verdict.DEGRADED


def healthy_envelope(
    model: DemoTransformer,
    tokens: Int[Tensor, "batch pos"],
    oracle: Mapping[str, Tensor],
) -> dict[str, float]:
    """Return the largest root mean square error of each activation over five runs of `model`.

    `model` is on the CPU, in the dtype under test. `oracle` has the exact activations by name. The
    runs differ only in rounding: one uses all threads, one uses a single thread, one runs each text
    alone instead of in a batch, and two change the embeddings by about one unit in the last place.
    """
    names = [name for name in oracle if name != LOGITS]
    envelope: dict[str, float] = {}

    def widen(activations: Mapping[str, Tensor]) -> None:
        for name, error in rms_errors(activations, oracle).items():
            # `max` alone could drop NaN.
            envelope[name] = max(envelope.get(name, 0.0), error, key=rank)

    widen(run(model, tokens, names))
    with threads(1):
        widen(run(model, tokens, names))
    alone = [run(model, row[None], names) for row in tokens]
    widen({name: torch.cat([one[name] for one in alone]) for name in alone[0]})
    for parity in (0, 1):
        with _nudged(model, parity):
            widen(run(model, tokens, names))
    return envelope


@contextmanager
def _nudged(model: DemoTransformer, parity: int) -> Iterator[None]:
    """Change the embeddings by about one unit in the last place inside a `with` block.

    For `parity` 0, the columns 0, 2, 4, … grow and the others shrink; for 1, the reverse.
    """

    def nudge(_: object, args: object, embed: Tensor) -> Tensor:
        ulp = torch.finfo(embed.dtype).eps
        by = torch.full(embed.shape[-1:], 1 - ulp / 2, dtype=embed.dtype)
        by[parity::2] = 1 + ulp
        return embed * by

    handle = model.hook_embed.register_forward_hook(nudge)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of threads of PyTorch's CPU kernels to `count` inside a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
