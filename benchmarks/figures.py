"""The results as plotly figures."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import plotly.graph_objects as go

from benchmarks.models import config, count_parameters
from benchmarks.results import Result, Results
from benchmarks.roofline import flops, weight_bytes
from clean_transformer.plots import STYLE, save

Number = Callable[[Result], float]

# What grows: in which measurement, in which of its results, and how large it is.
GROWTH: dict[str, tuple[str, Callable[[Result], bool], Number]] = {
    "batch": (
        "growth",
        lambda result: result.part.work.length == 256,
        lambda result: result.part.work.batch,
    ),
    "length": (
        "growth",
        lambda result: not result.part.work.last_only,
        lambda result: result.part.work.length,
    ),
    "context": ("decoding", lambda result: True, lambda result: result.part.work.length),
    "parameters": (
        "size",
        lambda result: True,
        lambda result: count_parameters(config(result.part.entrant.model)),
    ),
}


def throughput(results: Results, measurement: str) -> go.Figure:
    """Tokens per second of whoever took part, with quartiles."""
    rows = [row for row in results.results if row.measurement == measurement and row.values]
    speeds = [row.tokens_per_second for row in rows]
    best = [row.part.work.tokens / row.spread.low for row in rows]
    worst = [row.part.work.tokens / row.spread.high for row in rows]
    bars = go.Bar(
        x=speeds,
        y=[str(row.part.entrant) for row in rows],
        orientation="h",
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
    work = rows[0].part.work if rows else "not measured"
    return figure.update_layout(template=STYLE, title=f"{measurement}: {work}", margin_l=220)


def roofline(results: Results) -> go.Figure:
    """Operations per second over operations per byte of weights, below what the machine can do."""
    small = config("small")
    rows = [
        row
        for row in results.results
        if row.part.work.kind in ("forward", "step") and row.part.entrant.model == "small"
    ]
    return _lines(
        rows,
        lambda row: flops(small, row.part.work) / weight_bytes(small, row.part.entrant.dtype),
        lambda row: flops(small, row.part.work) / row.spread.median / 1e9,
        "Forward passes and decoding steps, below the machine's limit",
        "floating-point operations per byte of weights",
        "GFLOP/s",
    )


def growth(results: Results, axis: str) -> go.Figure:
    """Tokens per second as the batch, the length, the context or the model grows."""
    measurement, belongs, size = GROWTH[axis]
    rows = [r for r in results.results if r.measurement.startswith(measurement) and belongs(r)]
    title = f"Throughput over the {axis}"
    return _lines(rows, size, lambda row: row.tokens_per_second, title, axis, "tokens per second")


def write_figures(results: Results, folder: Path) -> None:
    """Write every figure as a page that needs no network."""
    folder.mkdir(parents=True, exist_ok=True)
    titles = dict.fromkeys(r.measurement for r in results.results if r.part.work.tokens)
    figures = {f"throughput, {title}": throughput(results, title) for title in titles}
    figures["roofline"] = roofline(results)
    figures |= {f"growth, {axis}": growth(results, axis) for axis in GROWTH}
    for name, figure in figures.items():
        save(figure, folder / f"{name.replace(', ', '-').replace(' ', '_')}.html")


def _lines(
    rows: Iterable[Result], x: Number, y: Number, title: str, x_title: str, y_title: str
) -> go.Figure:
    """A line for each contestant on each device in each dtype, on log axes."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.values:
            name = str(replace(row.part.entrant, model="small"))
            lines.setdefault(f"{name}, {row.part.entrant.device}", []).append((x(row), y(row)))
    figure = go.Figure()
    for name, points in lines.items():
        across, up = zip(*sorted(points), strict=True)
        dash = "dot" if name.startswith("limit") else "solid"
        figure.add_scatter(x=across, y=up, name=name, mode="lines+markers", line_dash=dash)
    figure.update_xaxes(type="log", title=x_title)
    figure.update_yaxes(type="log", title=y_title)
    return figure.update_layout(template=STYLE, title=title, showlegend=True)
