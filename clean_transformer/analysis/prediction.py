"""Computes what a model predicts after a text, and how well it predicts the text itself."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.reports.page import number, render_page
from clean_transformer.support.numerics import at_least_float32
from clean_transformer.text.language_model import is_text
from clean_transformer.text.symbols import visible
from clean_transformer.text.token_ids import token_ids

# In a notebook, the tokens with a loss of at least this many nats have the strongest color.
LARGE_LOSS = 10.0

# In a notebook, at most this many likely next tokens are shown for a token.
SHOWN = 5

Text = str | Int[Tensor, "pos"] | Int[Tensor, "1 pos"]


@dataclass(frozen=True)
class TokenScore:
    """A possible next token: its id, its logit, its probability and its string.

    `token` is the string, or the id in digits if the model has no tokenizer that knows the id.
    """

    id: int
    logit: float
    probability: float
    token: str


@dataclass(frozen=True)
class Prediction:
    """What a model predicts after one text, and how well it predicts the text itself.

    `tokens` has the tokens of the text as strings. `expected` has one list for each token of the
    text: the most likely next tokens after it, in descending order of their probabilities. `bottom`
    has the least likely next tokens after the whole text, in ascending order. `token_probabilities`
    has the probability of each token of the text, given the tokens before this token. `losses` has
    −log of these probabilities, in nats. Both tensors are on the CPU. They have no entry for the
    first token of the text, because no token precedes the first token.

    A notebook shows the text, with colors for the probabilities or losses of its tokens.
    """

    tokens: list[str]
    expected: list[list[TokenScore]]
    bottom: list[TokenScore]
    token_probabilities: Float[Tensor, "later_pos"]
    losses: Float[Tensor, "later_pos"]

    @property
    def top(self) -> list[TokenScore]:
        """The most likely next tokens after the whole text, in descending order."""
        return self.expected[-1]

    def __repr__(self) -> str:
        likely = ", ".join(f"{score.token!r} {score.probability:.3g}" for score in self.top[:3])
        loss = f", mean loss {self.losses.mean():.3g} nats" if len(self.losses) else ""
        return f"Prediction({len(self.tokens)} tokens{loss}; most likely next: {likely})"

    def _repr_html_(self) -> str:
        first = {"probability": 0, "loss": 0, "said": "The first token has no probability."}
        later = [
            {
                "probability": probability,
                "loss": min(loss / LARGE_LOSS, 1),
                "said": f"Probability {number(probability)}, loss {number(loss)} nats.",
            }
            for probability, loss in zip(
                self.token_probabilities.tolist(), self.losses.tolist(), strict=True
            )
        ]
        shown = [
            facts
            | {
                "text": token,
                "expected": [(visible(each.token), each.probability) for each in scores[:SHOWN]],
            }
            for facts, token, scores in zip(
                [first, *later], self.tokens, self.expected, strict=True
            )
        ]
        return render_page("prediction.html.jinja", tokens=shown)


@torch.no_grad()
def predict(model: DemoTransformer, text: Text, top: int = 5) -> Prediction:
    """Return what the model predicts after one text, and the probability of each token of the text.

    `Prediction.bottom` and each list in `Prediction.expected` have `top` entries. Raises
    `ValueError` for several texts, or if `top` is not from 1 to d_vocab.
    """
    if not 1 <= top <= model.cfg.d_vocab:
        raise ValueError(f"top is {top}; it must be from 1 to {model.cfg.d_vocab}, the vocabulary")
    tokens = single(model, text)
    logits = at_least_float32(model(tokens)[0])
    log_probs = logits.log_softmax(dim=-1)

    def scores(ids: Int[Tensor, "pos top"]) -> list[list[TokenScore]]:
        at = slice(-len(ids), None)  # the last positions, one for each row of ids
        found = (logits[at].gather(-1, ids), log_probs[at].gather(-1, ids).exp())
        values = zip(ids.tolist(), *(each.tolist() for each in found), strict=True)
        return [
            [TokenScore(*score) for score in zip(*row, strings(model, row[0]), strict=True)]
            for row in values
        ]

    actual = log_probs[:-1].gather(-1, tokens[0, 1:, None].long()).squeeze(-1).cpu()
    [bottom] = scores(logits[-1:].topk(top, largest=False).indices)
    return Prediction(
        tokens=strings(model, tokens[0].tolist()),
        expected=scores(logits.topk(top).indices),
        bottom=bottom,
        token_probabilities=actual.exp(),
        losses=-actual,
    )


def strings(model: DemoTransformer, ids: list[int]) -> list[str]:
    """Return each token as a string, or its id in digits if no tokenizer of the model knows it."""
    try:
        tokenizer = model.tokenizer
    except (ValueError, OSError):
        return [str(id_) for id_ in ids]
    known = [id_ for id_ in ids if id_ < tokenizer.d_vocab]
    names = dict(zip(known, tokenizer.to_str_tokens(known), strict=True))
    return [names.get(id_, str(id_)) for id_ in ids]


def single(model: DemoTransformer, text: Text) -> Int[Tensor, "1 pos"]:
    """Return the token ids of one text, [1 pos], on the model's device.

    `text` can also be a list of token ids. Raises `ValueError` for several texts, and `TypeError`
    if `text` is neither a text nor token ids.
    """
    tokens = (model.to_tokens(text) if is_text(text) else token_ids(text)).to(model.device)
    if tokens.ndim < 2:
        return tokens.reshape(1, -1)
    if len(tokens) != 1:
        raise ValueError(f"this takes one text, not {len(tokens)}; call it once per text")
    return tokens
