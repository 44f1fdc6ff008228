"""Compares a forward pass with an exact one, which the same model computes in float64."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.support.numerics import upcast

# The key of the logits in a dictionary of activations.
LOGITS = "logits"


@dataclass(frozen=True)
class Impact:
    """How much the predictions of the next token differ between a given run and an exact run.

    A run is a forward pass, and the exact run computes in float64. Each run makes one prediction at
    each position of each text. `positions` is the number of predictions in one run. `top1_flips` is
    the number of positions at which the two runs have different most likely tokens. `kl_divergence`
    is the mean KL(exact ‖ given), in nats. `loss_change` is the mean loss of the given run minus
    the mean loss of the exact run, in nats. If each text is one token, which nothing predicts,
    `loss_change` is None.
    """

    positions: int
    top1_flips: int
    kl_divergence: float
    loss_change: float | None

    def loss_in_words(self, form: str) -> str:
        """Return the change of the loss as text. `form` is the format of the number: "+.2g"."""
        if self.loss_change is None:
            return "no loss, because a single token has none"
        return f"loss {self.loss_change:{form}} nats"


def rms_errors(activations: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the root mean square error of each activation that is in both mappings, by name.

    `activations` has the activations of the given forward pass. `oracle` has the exact activations,
    computed in float64.
    """
    return {
        name: rms_difference(activations[name], exact)
        for name, exact in oracle.items()
        if name in activations
    }


def rms_difference(given: Tensor, exact: Tensor) -> float:
    """Return the root mean square of given − exact, computed in float64."""
    given, exact = upcast(given), upcast(exact)
    # Masked attention scores are -inf in both tensors, and -inf − -inf would be NaN.
    difference = torch.where(given == exact, 0.0, given - exact)
    return float(difference.square().mean().sqrt())


def impact(
    logits: Float[Tensor, "batch pos d_vocab"],
    exact: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
) -> Impact:
    """Return how much the predictions of `logits` differ from the predictions of `exact`.

    `exact` has the same model's logits, computed in float64. Both forward passes read `tokens`.
    """
    given, wanted = upcast(logits).log_softmax(-1), exact.log_softmax(-1)
    kl = (wanted.exp() * (wanted - given)).sum(-1).mean()

    def loss(log_probs: Tensor) -> Tensor:
        return F.nll_loss(log_probs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return Impact(
        positions=tokens.numel(),
        top1_flips=int((given.argmax(-1) != wanted.argmax(-1)).sum()),
        kl_divergence=float(kl),
        loss_change=float(loss(given) - loss(wanted)) if tokens.shape[1] > 1 else None,
    )
