"""Code that several plots share: colors, an axis with tokens, and `save`."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from torch import Tensor

from clean_transformer.reports.page import render_page
from clean_transformer.support.files import require_folder, write_atomically
from clean_transformer.text.symbols import visible

SUFFIXES = (".html", ".png")

# Two color scales: SEQUENTIAL for values from 0 to 1, and DIVERGING for values from -1 to 1.
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
        "modebar": {"orientation": "v"},  # a horizontal one would cover the title on a phone
        # Below the figure, because at its right the mode bar would cover the labels.
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
        "margin": {"l": 70, "r": 30, "t": 60, "b": 60},
    }
)


def save(figure: go.Figure, path: str | Path) -> None:
    """Write the figure to `path`, whose suffix is .html or .png.

    The HTML file can be viewed without a network connection. To write a PNG file, Chrome or
    Chromium must be installed. If an error occurs, an existing file at `path` is unchanged. Before
    this function draws the figure, it raises `ValueError` for any other suffix, and
    `FileNotFoundError` if the folder of the file does not exist.
    """
    file = Path(path)
    if file.suffix not in SUFFIXES:
        raise ValueError(f"cannot write a picture as {file.name!r}; name it *.html or *.png")
    require_folder(file)
    if file.suffix == ".png":
        write_atomically(file, figure.to_image("png", scale=2))
        return
    drawn = figure.to_html(full_html=False, config={"responsive": True, "displaylogo": False})
    write_atomically(file, render_page("figure.html.jinja", figure=drawn))


def numbers(values: Tensor) -> Any:
    """Return the values as a float32 NumPy array."""
    return values.detach().cpu().float().numpy()


def index_of(what: str, index: int, count: int) -> int:
    """Return `index` as an index from 0 to count − 1. A negative `index` counts from the end.

    Raises `IndexError` if `index` is out of range. The error message contains the word `what`, such
    as "layer": "there is no layer 12".
    """
    if not -count <= index < count:
        raise IndexError(f"there is no {what} {index}; this model has {what}s 0 to {count - 1}")
    return index % count


def label(token: str) -> str:
    """Return the token as text for a plot, in which spaces are visible (see `visible`).

    Special characters are escaped, so that plotly does not interpret the text as HTML or TeX.
    """
    return html.escape(visible(token), quote=False).replace("$", "&#36;")


def token_axis(tokens: Sequence[str]) -> dict[str, Any]:
    """Return plotly's settings for an axis on which each position has its token as label."""
    # The coordinates are positions and not tokens, because a text may contain a token twice.
    names = [label(token) for token in tokens]
    return {"tickvals": [*range(len(names))], "ticktext": names, "showgrid": False}
