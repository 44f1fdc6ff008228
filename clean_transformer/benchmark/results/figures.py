"""Draws figures of the results with plotly."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

# This import comes before plotly's. If plotly is missing, `analysis.plots` raises an error that
# says which extra to install.
from clean_transformer.analysis.plots import STYLE, save  # isort: split

import plotly.graph_objects as go

from clean_transformer.benchmark.contestants import OURS
from clean_transformer.benchmark.contestants.limit import flops, weight_bytes
from clean_transformer.benchmark.results.data import Result, Results
from clean_transformer.benchmark.running.models import config, count_parameters
from clean_transformer.benchmark.work import Setup
from clean_transformer.support.files import made_folder

Number = Callable[[Result], float]

# For each x-axis of the figures that `growth` draws: the title of the measurement, a function that
# says whether a result is in the figure, and a function that returns the result's x-coordinate.
GROWTH: dict[str, tuple[str, Callable[[Result], bool], Number]] = {
    "batch": (
        "growth",
        lambda result: result.part.work.length == 256 and not result.part.work.last_only,
        lambda result: result.part.work.batch,
    ),
    "length": (
        "growth",
        lambda result: result.part.work.batch == 1 and not result.part.work.last_only,
        lambda result: result.part.work.length,
    ),
    "context": ("decoding", lambda result: True, lambda result: result.part.work.length),
    "parameters": (
        "size",
        lambda result: True,
        lambda result: count_parameters(config(result.part.setup.model)),
    ),
}


def throughput(results: Results, name: str) -> go.Figure:
    """Return a bar chart of the median tokens per second in one measurement.

    There is one bar for each combination of a contestant, a dtype and a device. The error bars show
    the quartiles. `name` is the title of the measurement, without the device.
    """
    rows = [row for row in results.results if _name(row) == name and row.values]
    speeds = [row.tokens_per_second for row in rows]
    best = [row.part.work.tokens / row.spread.low for row in rows]
    worst = [row.part.work.tokens / row.spread.high for row in rows]
    setups = [row.part.setup for row in rows]
    bars = go.Bar(
        x=speeds,
        y=[f"{setup.contestant}<br>{setup.dtype}, {setup.device}" for setup in setups],
        orientation="h",
        marker_color=[_color(setup.contestant) for setup in setups],
        error_x={
            "symmetric": False,
            "array": [most - speed for most, speed in zip(best, speeds, strict=True)],
            "arrayminus": [speed - least for least, speed in zip(worst, speeds, strict=True)],
        },
        hovertemplate="%{y}: %{x:,.0f} tokens/s<extra></extra>",
    )
    figure = go.Figure(bars)
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title="tokens per second")
    title = f"{name}<br><sub>{rows[0].part.work}</sub>"
    return figure.update_layout(template=STYLE, title=title, height=150 + 46 * len(rows))


def roofline(results: Results) -> go.Figure:
    """Return a roofline plot: operations per second against operations per byte of weights.

    The points are the forward passes and decoding steps of GPT-2 small. Each contestant has one
    line per dtype and device. The lines of the contestant "limit" are dotted.
    """
    small = config("small")
    rows = [
        row
        for row in results.results
        if row.part.work.kind in ("forward", "step") and row.part.setup.model == "small"
    ]
    return _lines(
        rows,
        lambda row: flops(small, row.part.work) / weight_bytes(small, row.part.setup.dtype),
        lambda row: flops(small, row.part.work) / row.spread.median / 1e9,
        "Speed beside the machine's limit<br><sub>forward passes and decoding steps</sub>",
        "FLOP per byte of weights",
        "GFLOP/s",
        mode="markers",  # lines would join different kinds of work
    )


def growth(results: Results, axis: str) -> go.Figure:
    """Return a plot of tokens per second against `axis`, such as "batch" (a key of `GROWTH`)."""
    measurement, belongs, size = GROWTH[axis]
    rows = [row for row in results.results if _name(row) == measurement and belongs(row)]
    title = f"Throughput over the {axis}"
    return _lines(rows, size, lambda row: row.tokens_per_second, title, axis, "tokens per second")


def write_figures(results: Results, folder: Path) -> None:
    """Write each figure to `folder` as an HTML page that needs no network."""
    shown = [row for row in results.results if row.part.work.tokens and row.values]
    growing = {measurement for measurement, _, _ in GROWTH.values()}
    figures = {
        f"throughput-{name.replace(' ', '-')}": throughput(results, name)
        for name in dict.fromkeys(_name(row) for row in shown)
        if name not in growing
    }
    figures["roofline"] = roofline(results)
    figures |= {f"growth-{axis}": growth(results, axis) for axis in GROWTH}
    figures = {name: figure for name, figure in figures.items() if figure.data}
    with made_folder(folder):
        for name, figure in figures.items():
            save(figure, folder / f"{name}.html")


def _name(row: Result) -> str:
    """Return the title of the result's measurement, without the device."""
    return row.measurement.rpartition(", ")[0]


def _lines(
    rows: Iterable[Result],
    x: Number,
    y: Number,
    title: str,
    x_title: str,
    y_title: str,
    mode: str = "lines+markers",
) -> go.Figure:
    """Return a figure with logarithmic axes. Each contestant, device and dtype has one line.

    Each result in `rows` is a point. The functions `x` and `y` return its coordinates.
    """
    lines: dict[Setup, list[tuple[float, float]]] = {}
    for row in rows:
        if row.values:
            lines.setdefault(replace(row.part.setup, model="small"), []).append((x(row), y(row)))
    figure = go.Figure()
    # Each line has its own marker symbol, because many lines have the same color.
    for symbol, (setup, points) in enumerate(lines.items()):
        across, up = zip(*sorted(points), strict=True)
        figure.add_scatter(
            x=across,
            y=up,
            name=f"{setup}, {setup.device}",
            mode=mode,
            line_dash="dot" if setup.contestant == "limit" else "solid",
            line_width=4 if setup.contestant in OURS else 2,
            marker_symbol=symbol,
            marker_size=9,
            line_color=_color(setup.contestant),
        )
    figure.update_xaxes(type="log", title=x_title)
    figure.update_yaxes(type="log", title=y_title)
    figure.update_layout(template=STYLE, title=title, showlegend=True)
    # On a phone, the legend has one entry per line.
    return figure.update_layout(height=480 + 20 * len(lines), margin_r=20)


def _color(contestant: str) -> str:
    """Return the color of a contestant: ours stand out among gray ones."""
    if contestant in OURS:
        return "#1f5fae"
    return "#1c2430" if contestant == "limit" else "#a3adba"
