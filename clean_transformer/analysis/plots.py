"""Pictures of what a model computes, as plotly figures.

Each function takes activations of one text, with or without a batch of one, and the text's tokens
as strings (`Tokenizer.to_str_tokens`). `STYLE` is the template that they share.
"""

import html
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from clean_transformer.activation_cache import ActivationCache
from clean_transformer.analysis.lens import logit_lens as log_probs_by_layer
from clean_transformer.analysis.prediction import Text, single
from clean_transformer.model import DemoTransformer
from clean_transformer.support.files import require_folder, write_atomically
from clean_transformer.text.tokenizer import visible

try:
    import plotly.graph_objects as go
    from plotly.colors import sample_colorscale
    from plotly.subplots import make_subplots
except ImportError:
    raise ImportError(
        "pictures are drawn by plotly, which is not installed: "
        "pip install 'clean-transformer[plots]'"
    ) from None


SUFFIXES = (".html", ".png")


# From nothing to 1, and from -1 over nothing to 1.
SEQUENTIAL = ["#f7f8fa", "#c2daef", "#689bcc", "#1f5fae", "#0b2a52"]


DIVERGING = ["#8f1230", "#d63a30", "#f3b9b0", "#f7f8fa", "#aecde8", "#1f5fae", "#0b2a52"]


_AXIS = {
    "gridcolor": "#dfe4ea",
    "linecolor": "#dfe4ea",
    "zeroline": False,
    "ticks": "",
    "automargin": True,
}


STYLE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1c2430"},
        "title": {"x": 0.02, "xanchor": "left"},
        "colorway": ["#1f5fae", "#ee7f2d", "#17713c", "#a8479b", "#8a5300", "#5c6878"],
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "hoverlabel": {"align": "left"},
        "margin": {"l": 70, "r": 30, "t": 60, "b": 60},
    }
)


def attention_pattern(
    cache: ActivationCache,
    tokens: Sequence[str],
    *,
    layer: int | None = None,
    head: int | None = None,
) -> go.Figure:
    """How much each token (down) attends to each earlier one (across): one head, or a grid.

    Without `head`, every head of the layer; without `layer`, every layer, one row each. Raises
    `IndexError` for a layer or head that the model does not have.
    """
    layers = range(cache.n_layers) if layer is None else [_index("layer", layer, cache.n_layers)]
    patterns = [_one_text(cache["pattern", each, "attn"], 3, tokens) for each in layers]
    n_heads = len(patterns[0])
    heads = range(n_heads) if head is None else [_index("head", head, n_heads)]
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
    axis = _tokens(tokens) | {"tickfont_size": min(12, room)}
    if room < 7:
        axis["showticklabels"] = False  # they are still told on hover
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


def token_probabilities(
    probabilities: Float[Tensor, "predicted"], tokens: Sequence[str]
) -> go.Figure:
    """The probability that the model gave to each token but the first, before it read it."""
    values = _numbers(probabilities)
    _require_as_many(len(values) + 1, tokens)
    line = go.Scatter(
        x=np.arange(1, len(tokens)),
        y=values,
        mode="lines+markers",
        hovertemplate="%{x}: %{y:.4f}<extra></extra>",
    )
    figure = go.Figure(line)
    figure.update_xaxes(**_tokens(tokens), tickangle=-60)
    figure.update_yaxes(range=[0, 1.02], title="probability")
    return figure.update_layout(template=STYLE, title="Probability of each token")


def embedding_similarity(
    vectors: Float[Tensor, "*batch pos d_model"], tokens: Sequence[str]
) -> go.Figure:
    """The cosine between the vectors of every two tokens, such as `cache["embed"]`."""
    rows = torch.from_numpy(_one_text(vectors, 2, tokens))
    heat = go.Heatmap(
        z=cosine_similarity(rows[:, None], rows[None], dim=-1).numpy(),
        colorscale=DIVERGING,
        zmin=-1,
        zmax=1,
        colorbar_title="cosine",
        hovertemplate="%{y}, %{x}: %{z:.3f}<extra></extra>",
    )
    figure = go.Figure(heat)
    figure.update_xaxes(**_tokens(tokens), tickangle=-90)
    figure.update_yaxes(**_tokens(tokens), autorange="reversed")
    return figure.update_layout(
        template=STYLE, title="Cosine similarity of token embeddings", width=880, height=820
    )


def position_similarity(
    W_pos: Float[Tensor, "n_ctx d_model"], positions: Sequence[int]
) -> go.Figure:
    """The cosine between the embedding of each of `positions` and that of every position.

    Raises `IndexError` for a position that the model does not have.
    """
    rows = torch.from_numpy(_numbers(W_pos))
    figure = go.Figure()
    for position in [_index("position", each, len(rows)) for each in positions]:
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
    """The length of the residual stream at each token, through depth, on a log axis."""
    states, labels = cache.accumulated_resid(incl_mid=True)
    depth = np.stack([_one_text(state, 2, tokens) for state in states])
    norms = np.linalg.norm(depth, axis=-1)
    shades = sample_colorscale(SEQUENTIAL[1:], np.linspace(0, 1, len(tokens)).tolist())
    figure = go.Figure()
    for position, (token, shade) in enumerate(zip(tokens, shades, strict=True)):
        figure.add_scatter(
            x=labels,
            y=norms[:, position],
            name=f"{position} {_label(token)}",
            line_color=shade,
            hovertemplate="%{x}: %{y:.4g}",
        )
    figure.update_yaxes(type="log", title="norm")
    figure.update_xaxes(title="before a block (pre), between attention and MLP (mid)")
    return figure.update_layout(template=STYLE, title="Residual stream through depth")


def logit_lens(model: DemoTransformer, text: Text) -> go.Figure:
    """The likeliest next token if the model ended early, shaded by its probability."""
    tokens = single(model, text)
    log_probs, labels = log_probs_by_layer(model, tokens)
    best = log_probs.max(dim=-1)
    heat = go.Heatmap(
        z=_numbers(best.values.exp()),
        text=[[_label(token) for token in model.to_str_tokens(row)] for row in best.indices],
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
    figure.update_xaxes(**_tokens(names), tickangle=-60)
    figure.update_yaxes(**_tokens(labels), autorange="reversed")
    return figure.update_layout(
        template=STYLE,
        title="Logit lens: the next token, if the model ended here",
        width=240 + 72 * len(names),
        height=180 + 28 * len(labels),
    )


def losses(metrics: str | Path) -> go.Figure:
    """The loss of each training step, and of what was held out, from a run's metrics.jsonl."""
    lines = [json.loads(line) for line in Path(metrics).read_text("utf-8").splitlines()]
    figure = go.Figure()
    for key, name in (("loss", "training"), ("held_out_loss", "held out")):
        taken = [line for line in lines if line[key] is not None]
        steps, values = [line["step"] for line in taken], [line[key] for line in taken]
        figure.add_scatter(x=steps, y=values, name=name, mode="lines")
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="nats per token")
    return figure.update_layout(template=STYLE, title="Loss")


def save(figure: go.Figure, path: str | Path) -> None:
    """Write a page that needs no network, or a PNG, as the suffix says; whole or not at all.

    A PNG needs an installed Chrome or Chromium. Raises `ValueError` for another suffix and
    `FileNotFoundError` for a missing folder, before drawing.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise ValueError(f"cannot write a picture as {file.name!r}; name it *.html or *.png")
    require_folder(file)
    picture = figure.to_image("png", scale=2) if file.suffix == ".png" else figure.to_html()
    write_atomically(file, picture)


def _numbers(values: Tensor) -> Any:
    return values.detach().cpu().float().numpy()


def _one_text(activation: Tensor, ndim: int, tokens: Sequence[str]) -> Any:
    """The activation without its batch, which must hold one text of as many tokens."""
    if activation.ndim > ndim:
        if len(activation) != 1:
            raise ValueError(
                f"these activations are of {len(activation)} texts; run the model on one"
            )
        activation = activation[0]
    _require_as_many(activation.shape[-2], tokens)
    return _numbers(activation)


def _require_as_many(positions: int, tokens: Sequence[str]) -> None:
    if len(tokens) != positions:
        raise ValueError(
            f"{len(tokens)} tokens for {positions} positions; "
            "give Tokenizer.to_str_tokens of the text that the model read"
        )


def _index(what: str, index: int, count: int) -> int:
    if not -count <= index < count:
        raise IndexError(f"no {what} {index}; this model has {what}s 0 to {count - 1}")
    return index % count


def _label(token: str) -> str:
    """As it is read: plotly takes markup and TeX in labels."""
    return html.escape(visible(token), quote=False).replace("$", "&#36;")


def _tokens(tokens: Sequence[str]) -> dict[str, Any]:
    """An axis of positions, under the names of their tokens: the same token may come twice."""
    names = [_label(token) for token in tokens]
    return {"tickvals": [*range(len(names))], "ticktext": names, "showgrid": False}
