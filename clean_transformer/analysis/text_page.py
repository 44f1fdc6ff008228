"""What a model makes of one text, as one page that needs no network and no other file."""

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.analysis.lens import logit_lens
from clean_transformer.analysis.prediction import predict, single
from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.reports.page import render_page
from clean_transformer.support.files import write_atomically
from clean_transformer.text.tokenizer import visible

# How many of the likeliest tokens are told.
TOP = 5


# A page holds every attention weight, in up to three characters: these make about 4 MB.
MOST_WEIGHTS = 1_500_000


@torch.no_grad()
def explain(model: DemoTransformer, text: str) -> dict[str, Any]:
    """What the page shows, as plain values: probabilities to four digits, attention in thousandths.

    `patterns[layer][head]` holds what each token attends to, itself and those before it, one token
    after another. `lens[depth][position]` holds the likeliest next tokens as [id, probability], the
    last depth being the model's own answer. `labels` names every id.

    Raises `ValueError` for a text whose page would be too large, before running the model, and for
    a model that does not compute numbers.
    """
    tokens = single(model, text)
    _require_fit(model.cfg, tokens.shape[1])
    prediction = predict(model, tokens)
    log_probs, _ = logit_lens(model, tokens)
    if log_probs.isnan().any():
        raise ValueError(
            "the model computes NaN for this text; see with `clean-transformer doctor` "
            "whether the device is at fault, or else look at the weights"
        )
    best = log_probs.topk(min(TOP, model.cfg.d_vocab))
    ids = tokens[0].tolist()
    answers = log_probs[-1, :-1]
    ranks = 1 + (answers > answers.gather(-1, tokens[0, 1:, None].long())).sum(dim=-1)
    named = sorted({*ids, *best.indices.flatten().tolist()})
    labels = map(visible, model.to_str_tokens(named))
    return {
        "model": "the model" if model.source is None else Path(model.source).name,
        "cfg": {name: getattr(model.cfg, name) for name in ("n_layers", "n_heads", "d_model")},
        "tokens": model.to_str_tokens(tokens),
        "ids": ids,
        "labels": dict(zip(named, labels, strict=True)),
        "probabilities": [None, *map(_rounded, prediction.token_probabilities.tolist())],
        "ranks": [None, *ranks.tolist()],
        "lens": [
            [
                [[id_, _rounded(math.exp(value))] for id_, value in zip(*scores, strict=True)]
                for scores in zip(*layer, strict=True)
            ]
            for layer in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
        "patterns": _patterns(model, tokens),
    }


def render(explanation: dict[str, Any]) -> str:
    """The page of what `explain` found."""
    return render_page("explain.html.jinja", **explanation)


def write_html(explanation: dict[str, Any], file: Path) -> None:
    """Write what `explain` found as a page, whole or not at all."""
    write_atomically(file, render(explanation))


def _require_fit(cfg: Config, length: int) -> None:
    per_head = MOST_WEIGHTS // (cfg.n_layers * cfg.n_heads)
    # A head of n tokens has n (n + 1) / 2 weights.
    longest = (math.isqrt(8 * per_head + 1) - 1) // 2
    if length > longest:
        raise ValueError(
            f"a page of {length} tokens would be too large for a browser to enjoy; shorten the "
            f"text to {longest} tokens, for this model's {cfg.n_layers} layers of {cfg.n_heads} "
            "heads, or split it"
        )


def _patterns(model: DemoTransformer, tokens: Int[Tensor, "1 pos"]) -> list[list[list[int]]]:
    _, cache = model.run_with_cache(tokens, names=lambda name: name.endswith("hook_pattern"))
    query, key = torch.tril_indices(tokens.shape[1], tokens.shape[1])
    return [
        (1000 * pattern[0].cpu()[:, query, key].float()).round().int().tolist()
        for pattern in cache.values()
    ]


def _rounded(probability: float) -> float:
    return float(f"{probability:.4g}")
