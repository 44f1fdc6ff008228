"""How far the whole run drifts from the oracle, next to what rounding alone does on the CPU."""

from collections.abc import Callable, Iterator, Mapping
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


def run(model: DemoTransformer, tokens: Int[Tensor, "batch pos"]) -> dict[str, Tensor]:
    """Every default activation and the logits, on the CPU."""
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    return {**cache.to("cpu"), LOGITS: logits.cpu()}


def rms_errors(activations: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> dict[str, float]:
    """The root mean square of the difference, per activation; masked scores agree or are inf."""
    errors = {}
    for name, exact in oracle.items():
        if name in activations:
            given = upcast(activations[name])
            difference = torch.where(given == exact, 0.0, given - exact)
            errors[name] = float(difference.square().mean().sqrt())
    return errors


def healthy_envelope(
    model: DemoTransformer,
    tokens: Int[Tensor, "batch pos"],
    oracle: Mapping[str, Tensor],
) -> dict[str, float]:
    """The largest error, per activation, over runs on the CPU that rounding alone tells apart.

    They differ in the number of threads, in the batch size, and by one ulp in the embeddings.
    """
    variants: list[Callable[[], dict[str, Tensor]]] = [
        lambda: run(model, tokens),
        lambda: _with_threads(1, model, tokens),
        lambda: _one_by_one(model, tokens),
        lambda: _nudged(model, tokens, up=True),
        lambda: _nudged(model, tokens, up=False),
    ]
    envelope: dict[str, float] = {}
    for variant in variants:
        for name, error in rms_errors(variant(), oracle).items():
            envelope[name] = max(envelope.get(name, 0.0), error)
    return envelope


def _with_threads(
    count: int, model: DemoTransformer, tokens: Int[Tensor, "batch pos"]
) -> dict[str, Tensor]:
    with threads(count):
        return run(model, tokens)


def _one_by_one(model: DemoTransformer, tokens: Int[Tensor, "batch pos"]) -> dict[str, Tensor]:
    alone = [run(model, row[None]) for row in tokens]
    return {name: torch.cat([one[name] for one in alone]) for name in alone[0]}


def _nudged(
    model: DemoTransformer, tokens: Int[Tensor, "batch pos"], *, up: bool
) -> dict[str, Tensor]:
    def nudge(embed: Tensor, hook: object) -> Tensor:
        ulp = torch.finfo(embed.dtype).eps
        return embed * (1 + ulp if up else 1 - ulp / 2)

    names = [*model.default_points()]
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: object) -> None:
        kept[str(getattr(hook, "name", ""))] = value

    with torch.no_grad():
        logits = model.run_with_hooks(tokens, hooks=[("hook_embed", nudge), (names, keep)])
    return kept | {LOGITS: logits}


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
