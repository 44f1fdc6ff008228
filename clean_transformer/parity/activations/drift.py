"""How far the whole run drifts from the oracle, next to what rounding alone does on the CPU."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.analysis.comparison import LOGITS, rms_errors, run
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.verdict import Verdict


@dataclass(frozen=True)
class EndToEnd:
    """The error that has gathered in one activation by the time it is made.

    `error` is the root mean square of device - oracle, `envelope` the largest that healthy CPU
    runs in the same dtype have, `reference_error` that of a reference's own run in it.
    """

    name: str
    error: float
    envelope: float
    healthy: float
    reference_error: float | None = None

    @property
    def rho(self) -> float:
        """The error in units of the envelope."""
        if self.envelope:
            return self.error / self.envelope
        return 0.0 if self.error == 0 else torch.inf

    @property
    def verdict(self) -> Verdict:
        """DEGRADED beyond the envelope; where it began is for the teacher-forced rows to say."""
        return Verdict.PASS if self.rho <= self.healthy else Verdict.DEGRADED


def healthy_envelope(
    model: DemoTransformer,
    tokens: Int[Tensor, "batch pos"],
    oracle: Mapping[str, Tensor],
) -> dict[str, float]:
    """The largest error, per activation, over runs on the CPU that rounding alone tells apart.

    They differ in the number of threads, in the batch size, and by one ulp in the embeddings.
    """
    names = [name for name in oracle if name != LOGITS]
    envelope: dict[str, float] = {}

    def widen(activations: Mapping[str, Tensor]) -> None:
        for name, error in rms_errors(activations, oracle).items():
            envelope[name] = max(envelope.get(name, 0.0), error)

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
    """PyTorch's CPU kernels on that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
