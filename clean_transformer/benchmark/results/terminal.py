"""Prints the results and the goals as tables."""

from collections import Counter
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clean_transformer.benchmark.judgment import Judged
from clean_transformer.benchmark.results.data import Result, Results
from clean_transformer.benchmark.work import format_value

COLORS = {"HELD": "green", "MISSED": "red", "NOT MEASURED": "yellow"}


def print_results(results: Results, console: Console) -> None:
    """Print one table per measurement, with one row per contestant and its work.

    A row has the median, the quartiles, the tokens per second, and the share of the limit: the
    shortest possible time divided by the contestant's time. For dtypes other than float32, a row
    also has the KL divergence from our model in float32. Below the table, a line gives the reason
    for each contestant that was not measured.
    """
    for rows in results.by_measurement():
        [title] = {row.measurement for row in rows.values()}
        table = Table(box=box.SIMPLE, title=title, title_justify="left", title_style="bold")
        table.add_column("work")
        table.add_column("contestant", no_wrap=True)
        table.add_column("dtype", no_wrap=True)
        for column in ("median", "quartiles", "tokens/s", "of limit", "KL"):
            table.add_column(column, justify="right", no_wrap=True)
        for part, row in rows.items():
            setup = part.setup
            work = f"{part.work}, {setup.model}" if setup.model != "small" else str(part.work)
            table.add_row(work, setup.contestant, setup.dtype, *_figures(results, row))
        console.print(table)
        for part, row in rows.items():
            if not row.values:
                console.print(f"NOT MEASURED: {part}: {row.why}", style="yellow", markup=False)


def _figures(results: Results, row: Result) -> Iterator[str]:
    if not row.values:
        yield "[yellow]—[/]"
        return
    spread, work = row.spread, row.part.work
    yield format_value(spread.median, work)
    yield f"{format_value(spread.low, work)} – {format_value(spread.high, work)}"
    yield f"{row.tokens_per_second:,.0f}" if work.tokens else ""
    share = results.share_of_limit(row)
    yield f"{share.median:.0%}" if share else ""
    narrow = row.kl_divergence is not None and row.part.setup.dtype != "float32"
    yield f"{row.kl_divergence:.1g}" if narrow else ""


def print_goals(judged: Sequence[Judged], absent: Sequence[str], console: Console) -> None:
    """Print a table of the goals, with the bound, measured quotient, verdict and note of each.

    `absent` are the devices that this machine does not have.
    """
    table = Table(box=box.SIMPLE, title="goals", title_justify="left", title_style="bold")
    table.add_column("device", no_wrap=True)
    table.add_column("what")
    for column in ("goal", "measured", ""):
        table.add_column(column, no_wrap=True)
    table.add_column("note")
    for one in judged:
        goal, measured = one.goal, one.measured
        table.add_row(
            goal.device,
            goal.what,
            goal.bound,
            goal.number(measured.median) if measured else "",
            f"[{COLORS[one.verdict]}]{one.verdict}[/]",
            f"this machine has no {goal.device}" if goal.device in absent else escape(one.note),
        )
    console.print(table)
    count = Counter(one.verdict for one in judged)
    console.print(", ".join(f"{count[verdict]} {verdict}" for verdict in COLORS if count[verdict]))
