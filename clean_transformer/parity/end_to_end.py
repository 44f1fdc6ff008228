"""How far the whole run drifts from the oracle, next to what rounding alone does on the CPU."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.parity.isolate import upcast
from clean_transformer.parity.verdict import Verdict

LOGITS = "logits"


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


@dataclass(frozen=True)
class Impact:
    """What a user would notice: next-token predictions beside the oracle's."""

    positions: int
    top1_flips: int
    kl_divergence: float
    loss_change: float


def run(
    model: DemoTransformer, tokens: Int[Tensor, "batch pos"], names: list[str] | None = None
) -> dict[str, Tensor]:
    """The named activations, by default all but the per-head ones, and the logits, on the CPU."""
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names=names)
    return {**cache.to("cpu"), LOGITS: logits.cpu()}


def rms_errors(activations: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> dict[str, float]:
    """The root mean square of the difference, per activation."""
    return {
        name: rms_difference(activations[name], exact)
        for name, exact in oracle.items()
        if name in activations
    }


def rms_difference(given: Tensor, exact: Tensor) -> float:
    """The root mean square of given - exact, in float64; masked scores agree or are inf."""
    given, exact = upcast(given), upcast(exact)
    difference = torch.where(given == exact, 0.0, given - exact)
    return float(difference.square().mean().sqrt())


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
        up = torch.arange(embed.shape[-1]) % 2 == parity
        return embed * torch.where(up, 1 + ulp, 1 - ulp / 2).to(embed.dtype)

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


def impact(
    logits: Float[Tensor, "batch pos d_vocab"],
    exact: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
) -> Impact:
    """Top-1 flips, mean KL(oracle || device) in nats, and the change of the mean loss in nats."""
    given, wanted = upcast(logits).log_softmax(-1), exact.log_softmax(-1)
    kl = (wanted.exp() * (wanted - given)).sum(-1).mean()

    def loss(log_probs: Tensor) -> Tensor:
        return F.nll_loss(log_probs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return Impact(
        positions=tokens.numel(),
        top1_flips=int((given.argmax(-1) != wanted.argmax(-1)).sum()),
        kl_divergence=float(kl),
        loss_change=float(loss(given) - loss(wanted)),
    )
