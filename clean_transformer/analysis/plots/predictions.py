"""Plots what a model predicts, and the loss of a training run."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from clean_transformer.analysis.lens import logit_lens as log_probs_by_depth
from clean_transformer.analysis.one_text import require_as_many
from clean_transformer.analysis.plots.style import (
    SEQUENTIAL,
    STYLE,
    label,
    numbers,
    token_axis,
)
from clean_transformer.analysis.prediction import Text, single
from clean_transformer.model import DemoTransformer


def token_probabilities(
    probabilities: Float[Tensor, "predicted"], tokens: Sequence[str]
) -> go.Figure:
    """Plot the probability of each token of a text, given the tokens before this token.

    `probabilities` is the tensor `Prediction.token_probabilities`. `tokens` has all tokens of the
    text, including the first token, which has no probability. Raises `ValueError` if `tokens` does
    not have exactly one more entry than `probabilities`.
    """
    values = numbers(probabilities)
    require_as_many(len(values) + 1, tokens)
    line = go.Scatter(
        x=np.arange(1, len(tokens)),
        y=values,
        mode="lines+markers",
        hovertemplate="%{x}: %{y:.4f}<extra></extra>",
    )
    figure = go.Figure(line)
    figure.update_xaxes(**token_axis(tokens), tickangle=-90)
    figure.update_yaxes(range=[0, 1.02], title="probability")
    width = max(500, 120 + 22 * len(tokens))  # so that the labels do not overlap
    return figure.update_layout(template=STYLE, title="Probability of each token", width=width)


def logit_lens(model: DemoTransformer, text: Text) -> go.Figure:
    """Plot the most likely next token at each depth, as if the model ended at this depth.

    There is one depth before each block, and one depth after the last block. The plot has one row
    per depth and one column per token of the text. The color shows the probability of the most
    likely token. Raises `ValueError` for several texts.
    """
    tokens = single(model, text)
    log_probs, labels = log_probs_by_depth(model, tokens)
    best = log_probs.max(dim=-1)
    heat = go.Heatmap(
        z=numbers(best.values.exp()),
        text=[[label(token) for token in model.to_str_tokens(row)] for row in best.indices],
        texttemplate="%{text}",
        textfont_size=11,
        colorscale=SEQUENTIAL,
        zmin=0,
        zmax=1,
        colorbar_title="probability",
        hovertemplate="%{y}, after %{x}: %{text}, %{z:.3f}<extra></extra>",
    )
    figure = go.Figure(heat)
    names = model.to_str_tokens(tokens)
    figure.update_xaxes(**token_axis(names), tickangle=-60)
    figure.update_yaxes(**token_axis(labels), autorange="reversed")
    return figure.update_layout(
        template=STYLE,
        title="Logit lens: the next token, if the model ended here",
        width=240 + 72 * len(names),
        height=180 + 28 * len(labels),
    )


def losses(metrics: str | Path) -> go.Figure:
    """Plot the training loss and the held-out loss of a training run.

    `metrics` is the path of the file `metrics.jsonl` that the run wrote.
    """
    lines = [json.loads(line) for line in Path(metrics).read_text("utf-8").splitlines()]
    figure = go.Figure()
    for key, name in (("loss", "training"), ("held_out_loss", "held out")):
        taken = [line for line in lines if line[key] is not None]
        steps, values = [line["step"] for line in taken], [line[key] for line in taken]
        figure.add_scatter(x=steps, y=values, name=name, mode="lines")
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="nats per token")
    return figure.update_layout(template=STYLE, title="Loss")
