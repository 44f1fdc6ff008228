"""Writes an HTML file that shows what a model predicts at each token of a text, and why."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.analysis.lens import lens_log_probs
from clean_transformer.analysis.packing import pack, refuse_nan, triangle
from clean_transformer.analysis.prediction import predict, single
from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.reports.page import framed, render_page
from clean_transformer.support.files import write_atomically
from clean_transformer.text.symbols import visible, visible_bytes

# At each depth (see `logit_lens`) and position, the page shows this many of the most likely next
# tokens.
TOP = 5

# The largest number of characters that all attention patterns may need on a page.
MOST_CHARACTERS = 3_800_000

# The steps to which attention weights may be rounded, in thousandths. A page has the smallest step
# with which its patterns need at most `MOST_CHARACTERS`.
STEPS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)

# The page can show the next tokens at these temperatures.
TEMPERATURES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0)

# What a token that is a part of a character has as text.
BROKEN = "\N{REPLACEMENT CHARACTER}"

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
    patterns: list[list[str]]
    step: int
    scales: list[list[float]]
    temperatures: tuple[float, ...] = TEMPERATURES

    def __repr__(self) -> str:
        return f"Explanation({len(self.tokens)} tokens, read by {self.model})"

    def _repr_html_(self) -> str:
        return framed(render(self))


@torch.no_grad()
def explain(model: DemoTransformer, text: str) -> Explanation:
    """Return what the model predicts in `text` after each layer, and what its heads attend to.

    Probabilities are rounded to four significant digits. Raises `ValueError` if the page would be
    too large, if the text has more tokens than the model has positions, and if the model computes
    NaN.
    """
    tokens = single(model, text)
    prediction = predict(model, tokens)
    ids = tokens[0].tolist()
    lens: list[list[Scores]] = []
    # The log-probabilities of all depths together would need gigabytes.
    for log_probs in lens_log_probs(model, tokens):
        refuse_nan(log_probs)
        best = log_probs.topk(min(TOP, model.cfg.d_vocab))
        scores = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
        lens.append([[*zip(each, map(_rounded, values), strict=True)] for each, values in scores])
    predicted = log_probs[:-1]
    ranks = 1 + (predicted > predicted.gather(-1, tokens[0, 1:, None].long())).sum(dim=-1)
    scales = [(log_probs / temperature).logsumexp(dim=-1) for temperature in TEMPERATURES]
    named = sorted({*ids, *(id_ for layer in lens for scores in layer for id_, _ in scores)})
    strings = dict(zip(named, model.to_str_tokens(named), strict=True))
    labels = {id_: _label(model, id_, text) for id_, text in strings.items()}
    step, patterns = _patterns(model, tokens)
    return Explanation(
        model="the model" if model.source is None else Path(model.source).name,
        cfg=model.cfg,
        tokens=[labels[id_] if BROKEN in strings[id_] else strings[id_] for id_ in ids],
        ids=ids,
        labels=labels,
        probabilities=[None, *map(_rounded, prediction.token_probabilities.tolist())],
        ranks=[None, *ranks.tolist()],
        lens=lens,
        patterns=patterns,
        step=step,
        scales=torch.stack(scales, 1).double().round(decimals=4).tolist(),
    )


def _label(model: DemoTransformer, id_: int, text: str) -> str:
    """Return a token's readable form; of a token that is a part of a character, its bytes."""
    piece = model.tokenizer.backend.id_to_token(id_)
    return visible(text) if BROKEN not in text or piece is None else visible_bytes(piece)


def render(explanation: Explanation, *, form: str | None = None, error: str = "") -> str:
    """Return the HTML page that shows `explanation`.

    If `form` is not None, the page has a form for another text, in which the text is `form`. The
    form also shows `error`.
    """
    return render_page("explain.html.jinja", form=form, error=error, **vars(explanation))


def write_html(explanation: Explanation, file: str | Path) -> None:
    """Write the HTML page about `explanation` to `file`.

    If an error occurs, an existing `file` is unchanged.
    """
    write_atomically(Path(file), render(explanation))


def _patterns(model: DemoTransformer, tokens: Int[Tensor, "1 pos"]) -> tuple[int, list[list[str]]]:
    """Return the smallest rounding step with which the patterns fit on a page, and the patterns."""
    layers: list[Int[Tensor, "head pair"]] = []

    def keep(pattern: Tensor, hook: object) -> None:
        layers.append(triangle(pattern[0]))  # at once, because all patterns need much memory

    model.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith("hook_pattern"), keep)])
    for step in STEPS:
        packed: list[list[str]] = []
        characters = 0
        for layer in layers:
            packed.append(pack(layer, step))
            characters += sum(map(len, packed[-1]))
            if characters > MOST_CHARACTERS:
                break
        else:
            return step, packed
    fits = tokens.shape[1] * len(packed) // (len(layers) + 1)
    raise ValueError(
        f"a page of {tokens.shape[1]} tokens would be too large for a browser, because this model "
        f"has {len(layers)} layers; shorten the text to about {max(1, fits)} tokens"
    )


def _rounded(probability: float) -> float:
    return float(f"{probability:.4g}")
