"""Plots similarities of embeddings, and norms of the residual stream."""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.colors import sample_colorscale
from torch import Tensor
from torch.nn.functional import cosine_similarity

from clean_transformer.activation_cache import ActivationCache
from clean_transformer.analysis.one_text import of_one_text
from clean_transformer.analysis.plots.style import (
    DIVERGING,
    SEQUENTIAL,
    STYLE,
    index_of,
    label,
    numbers,
    token_axis,
)


def embedding_similarity(
    vectors: Float[Tensor, "*batch pos d_model"], tokens: Sequence[str]
) -> go.Figure:
    """Plot the cosine similarity of every pair of vectors.

    `vectors` has one vector for each token of one text, for example `cache["embed"]`. `tokens` has
    the tokens as strings. Raises `ValueError` for several texts, and if `tokens` does not have one
    token per vector.
    """
    rows = torch.from_numpy(numbers(of_one_text(vectors, 2, tokens)))
    heat = go.Heatmap(
        z=cosine_similarity(rows[:, None], rows[None], dim=-1).numpy(),
        colorscale=DIVERGING,
        zmin=-1,
        zmax=1,
        colorbar_title="cosine",
        hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
    )
    figure = go.Figure(heat)
    figure.update_xaxes(**token_axis(tokens), tickangle=-90)
    figure.update_yaxes(**token_axis(tokens), autorange="reversed")
    return figure.update_layout(
        template=STYLE, title="Cosine similarity of token embeddings", width=880, height=820
    )


def position_similarity(
    W_pos: Float[Tensor, "n_ctx d_model"], positions: Sequence[int]
) -> go.Figure:
    """Plot how similar the embeddings of `positions` are to the embeddings of all positions.

    Each position in `positions` has one line in the plot. The line shows the cosine similarity of
    the position's embedding with the embedding of every position. Raises `IndexError` for a
    position that the model does not have.
    """
    rows = torch.from_numpy(numbers(W_pos))
    figure = go.Figure()
    for position in [index_of("position", each, len(rows)) for each in positions]:
        figure.add_scatter(
            y=cosine_similarity(rows, rows[position], dim=-1).numpy(),
            name=f"position {position}",
            hovertemplate="%{x}: %{y:.3f}",
        )
    figure.update_xaxes(title="position")
    figure.update_yaxes(title="cosine")
    return figure.update_layout(
        template=STYLE, title="Cosine similarity of position embeddings", showlegend=True
    )


def residual_norms(cache: ActivationCache, tokens: Sequence[str]) -> go.Figure:
    """Plot the norm of the residual stream at each depth, with one line per token of the text.

    The depths are before each block, between the attention and the MLP of each block, and after the
    last block. The axis of the norm is logarithmic. Raises `ValueError` for several texts, and if
    `tokens` does not have one token per position.
    """
    states, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    depth = np.stack([numbers(of_one_text(state, 2, tokens)) for state in states])
    norms = np.linalg.norm(depth, axis=-1)
    shades = sample_colorscale(SEQUENTIAL[1:], np.linspace(0, 1, len(tokens)).tolist())
    figure = go.Figure()
    for position, (token, shade) in enumerate(zip(tokens, shades, strict=True)):
        figure.add_scatter(
            x=labels,
            y=norms[:, position],
            name=f"{position} {label(token)}",
            line_color=shade,
            hovertemplate="%{x}: %{y:.4g}",
        )
    figure.update_yaxes(type="log", title="norm")
    figure.update_xaxes(title="before attention (pre), before the MLP (mid)")
    height = 450 + 12 * len(tokens)  # so that the legend has room for every token
    return figure.update_layout(
        template=STYLE, title="Residual stream through depth", height=height
    )
