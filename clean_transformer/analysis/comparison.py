"""TODO analysis/comparison."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.support.numerics import upcast

LOGITS = "logits"


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
