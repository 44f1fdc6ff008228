"""Computes what a model predicts after a text, and how well it predicts the text itself."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.support.numerics import at_least_float32

Text = str | Int[Tensor, "pos"] | Int[Tensor, "1 pos"]


@dataclass(frozen=True)
class TokenScore:
    """A possible next token: its id, its logit and its probability."""

    id: int
    logit: float
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a model predicts after one text, and how well it predicts the text itself.

    `top` has the most likely next tokens, in descending order of their probabilities. `bottom` has
    the least likely next tokens, in ascending order. `token_probabilities` has the probability of
    each token of the text, given the tokens before this token. `losses` has −log of these
    probabilities, in nats. Both tensors are on the CPU. They have no entry for the first token of
    the text, because no token precedes the first token.
    """

    top: list[TokenScore]
    bottom: list[TokenScore]
    token_probabilities: Float[Tensor, "later_pos"]
    losses: Float[Tensor, "later_pos"]


@torch.no_grad()
def predict(model: DemoTransformer, text: Text, top: int = 5) -> Prediction:
    """Return what the model predicts after one text, and the probability of each token of the text.

    `Prediction.top` and `Prediction.bottom` each have `top` entries. Raises `ValueError` for
    several texts, or if `top` is not from 1 to d_vocab.
    """
    if not 1 <= top <= model.cfg.d_vocab:
        raise ValueError(f"top is {top}; it must be from 1 to {model.cfg.d_vocab}, the vocabulary")
    tokens = single(model, text)
    logits = at_least_float32(model(tokens)[0])
    log_probs = logits.log_softmax(dim=-1)

    def scores(ids: Int[Tensor, "top"]) -> list[TokenScore]:
        values = zip(ids, logits[-1, ids], log_probs[-1, ids].exp(), strict=True)
        return [TokenScore(int(id_), float(logit), float(p)) for id_, logit, p in values]

    actual = log_probs[:-1].gather(-1, tokens[0, 1:, None].long()).squeeze(-1).cpu()
    return Prediction(
        top=scores(logits[-1].topk(top).indices),
        bottom=scores(logits[-1].topk(top, largest=False).indices),
        token_probabilities=actual.exp(),
        losses=-actual,
    )


def single(model: DemoTransformer, text: Text) -> Int[Tensor, "1 pos"]:
    """Return the token ids of one text, [1 pos], on the model's device.

    Raises `ValueError` for several texts.
    """
    tokens = model.to_tokens(text) if isinstance(text, str) else text.to(model.device)
    if tokens.ndim == 1:
        return tokens[None]
    if len(tokens) != 1:
        raise ValueError(f"this takes one text, not {len(tokens)}; call it once per text")
    return tokens
