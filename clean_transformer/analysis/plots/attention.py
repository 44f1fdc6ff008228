"""Plots attention patterns."""

from collections.abc import Sequence
from itertools import product

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from clean_transformer.activation_cache import ActivationCache
from clean_transformer.analysis.one_text import of_one_text
from clean_transformer.analysis.plots.style import (
    SEQUENTIAL,
    STYLE,
    index_of,
    numbers,
    token_axis,
)


def attention_pattern(
    cache: ActivationCache,
    tokens: Sequence[str],
    *,
    layer: int | None = None,
    head: int | None = None,
) -> go.Figure:
    """Plot how much each token of a text attends to itself and to earlier tokens.

    There is one panel per head. In a panel, the vertical axis shows the query tokens, and the
    horizontal axis shows the key tokens, to which the queries attend. If `head` is None, the figure
    shows every head. If `layer` is None, the figure shows every layer. If `head` and `layer` are
    None, each row of panels is one layer. Raises `IndexError` for a layer or head that the model
    does not have.
    """
    layers = range(cache.n_layers) if layer is None else [index_of("layer", layer, cache.n_layers)]
    patterns = [numbers(of_one_text(cache["pattern", each, "attn"], 3, tokens)) for each in layers]
    n_heads = len(patterns[0])
    heads = range(n_heads) if head is None else [index_of("head", head, n_heads)]
    panels = [*product(range(len(layers)), heads)]
    everything = layer is None and head is None
    columns = n_heads if everything else min(len(panels), 4)
    rows = -(-len(panels) // columns)
    side = 110 if everything else {1: 640, 2: 420, 3: 320, 4: 260}[columns]
    names = [f"layer {layers[row]}, head {each}" for row, each in panels]
    figure = make_subplots(
        rows,
        columns,
        shared_xaxes="all",
        shared_yaxes="all",
        subplot_titles=[f"{layers[row]}.{each}" for row, each in panels] if everything else names,
        horizontal_spacing=0.2 / columns,
        vertical_spacing=0.25 / rows,
    )
    for panel, ((row, each), name) in enumerate(zip(panels, names, strict=True)):
        heat = go.Heatmap(
            z=patterns[row][each],
            coloraxis="coloraxis",
            hovertemplate="%{y} attends to %{x}: %{z:.3f}<extra>" + name + "</extra>",
        )
        figure.add_trace(heat, panel // columns + 1, panel % columns + 1)
    room = 0.8 * side / len(tokens)
    axis = token_axis(tokens) | {"tickfont_size": min(12, room)}
    if room < 7:
        axis["showticklabels"] = False  # the text under the mouse pointer still shows the tokens
    figure.update_xaxes(**axis, tickangle=-90)
    figure.update_yaxes(**axis, autorange="reversed")
    figure.update_annotations(font_size=10 if everything else 13)
    bar = {"title": "attention", "lenmode": "pixels", "len": 300, "y": 1, "yanchor": "top"}
    return figure.update_layout(
        template=STYLE,
        title="Attention of each token (down) to those before it (across)",
        coloraxis={"colorscale": SEQUENTIAL, "cmin": 0, "cmax": 1, "colorbar": bar},
        width=columns * side + 240,
        height=rows * side + 210,
        margin_t=90,
    )
