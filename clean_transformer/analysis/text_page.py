"""Writes an HTML file that shows what a model predicts at each token of a text, and why."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.analysis.attention_view import triangle
from clean_transformer.analysis.lens import logit_lens
from clean_transformer.analysis.prediction import predict, single
from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.reports.page import framed, render_page
from clean_transformer.support.files import write_atomically
from clean_transformer.text.symbols import visible

# At each depth (see `logit_lens`) and position, the page shows this many of the most likely next
# tokens.
TOP = 5

# The largest number of attention weights on a page. In the file, a weight takes about three
# characters, so all weights take at most about 4 MB.
MOST_WEIGHTS = 1_500_000

Scores = list[tuple[int, float]]


@dataclass(frozen=True)
class Explanation:
    """The data of the HTML page about one text. A notebook shows this page.

    `model` is the model's name, and `cfg` is its architecture. `tokens` and `ids` are the tokens of
    the text, as strings and as ids. `labels` maps every token id on the page to the token's string,
    with visible spaces. `probabilities` has the probability that the model gave to each token of
    the text. `ranks` has the rank of each token of the text among all tokens in the vocabulary: the
    most likely token has rank 1. The first entry of `probabilities` and of `ranks` is None, because
    no token precedes the first token.

    `lens[depth][position]` has the ids of the most likely next tokens and their probabilities, as
    if the model ended at that depth (see `logit_lens`). The first depth is before the first block,
    and the last depth is the model's own prediction.

    `patterns[layer][head]` is a flat list of the attention weights of a head, multiplied by 1000
    and rounded. The weight of query 0 for key 0 comes first, then the two weights of query 1, and
    so on.
    """

    model: str
    cfg: Config
    tokens: list[str]
    ids: list[int]
    labels: dict[int, str]
    probabilities: list[float | None]
    ranks: list[int | None]
    lens: list[list[Scores]]
    patterns: list[list[list[int]]]

    def __repr__(self) -> str:
        return f"Explanation({len(self.tokens)} tokens, read by {self.model})"

    def _repr_html_(self) -> str:
        return framed(render(self))


@torch.no_grad()
def explain(model: DemoTransformer, text: str) -> Explanation:
    """Return what the model predicts in `text` after each layer, and what its heads attend to.

    Probabilities are rounded to four significant digits. Raises `ValueError` before the model runs
    if the page would be too large. Also raises `ValueError` if the model computes NaN.
    """
    tokens = single(model, text)
    _require_fit(model.cfg, tokens.shape[1])
    prediction = predict(model, tokens)
    log_probs, _ = logit_lens(model, tokens)
    if log_probs.isnan().any():
        raise ValueError(
            "the model computes NaN for this text; run `clean-transformer doctor` to see whether "
            "the device is faulty, and otherwise check the weights"
        )
    best = log_probs.topk(min(TOP, model.cfg.d_vocab))
    ids = tokens[0].tolist()
    predicted = log_probs[-1, :-1]
    ranks = 1 + (predicted > predicted.gather(-1, tokens[0, 1:, None].long())).sum(dim=-1)
    named = sorted({*ids, *best.indices.flatten().tolist()})
    labels = map(visible, model.to_str_tokens(named))
    return Explanation(
        model="the model" if model.source is None else Path(model.source).name,
        cfg=model.cfg,
        tokens=model.to_str_tokens(tokens),
        ids=ids,
        labels=dict(zip(named, labels, strict=True)),
        probabilities=[None, *map(_rounded, prediction.token_probabilities.tolist())],
        ranks=[None, *ranks.tolist()],
        lens=[
            [
                [(id_, _rounded(math.exp(value))) for id_, value in zip(*scores, strict=True)]
                for scores in zip(*layer, strict=True)
            ]
            for layer in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
        patterns=_patterns(model, tokens),
    )


def render(explanation: Explanation) -> str:
    """Return the HTML page that shows `explanation`."""
    return render_page("explain.html.jinja", **vars(explanation))


def write_html(explanation: Explanation, file: str | Path) -> None:
    """Write the HTML page about `explanation` to `file`.

    If an error occurs, an existing `file` is unchanged.
    """
    write_atomically(Path(file), render(explanation))


def _require_fit(cfg: Config, length: int) -> None:
    per_head = MOST_WEIGHTS // (cfg.n_layers * cfg.n_heads)
    # A head has n (n + 1) / 2 weights for n tokens.
    longest = (math.isqrt(8 * per_head + 1) - 1) // 2
    if length > longest:
        raise ValueError(
            f"a page of {length} tokens would be too large for a browser; with this model's "
            f"{cfg.n_layers} layers of {cfg.n_heads} heads, shorten the text to {longest} tokens, "
            "or split it"
        )


def _patterns(model: DemoTransformer, tokens: Int[Tensor, "1 pos"]) -> list[list[list[int]]]:
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    return [triangle(pattern[0]) for pattern in cache.values()]


def _rounded(probability: float) -> float:
    return float(f"{probability:.4g}")
