"""Prints the results and the goals as tables."""

from collections import Counter
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape

from clean_transformer.benchmark.judgment import Judged
from clean_transformer.benchmark.results.data import Result, Results
from clean_transformer.benchmark.work import format_value
from clean_transformer.reports.terminal import FoldingTable

# The measurements of a `Question`, in the order of the columns of `speed_table`. True: the next
# column has the share of the limit.
SPEED_COLUMNS = {"forward": True, "first token": False, "generate": True, "memory": False}

COLORS = {"HELD": "green", "MISSED": "red", "NOT MEASURED": "yellow"}


def speed_table(results: Results, title: str) -> FoldingTable:
    """Return a table for people, with one row per contestant and device.

    The columns are tokens per second, the share of the limit (the shortest possible time divided by
    the contestant's time), the time to the first token, and memory. A cell is empty until its work
    is measured.
    """
    table = FoldingTable(box=box.SIMPLE, title=title, title_justify="left", title_style="bold")
    table.add_column("contestant")
    for column in ("read, tokens/s", "of limit", "first token", "write, tokens/s", "of limit"):
        table.add_column(column, justify="right")
    table.add_column("memory", justify="right")
    rows: dict[str, dict[str, Result]] = {}
    for result in results.results:
        name, _, device = result.measurement.rpartition(", ")
        contestant = result.part.setup.contestant
        rows.setdefault(f"{contestant}, {device}", {})[name] = result
    for name, row in rows.items():
        cells = []
        for work, of_limit in SPEED_COLUMNS.items():
            found = row.get(work)
            measured = found is not None and bool(found.values)
            cells.append(_speed(found) if found and measured else "—" if found else "")
            if of_limit:
                share = results.share_of_limit(found) if found and measured else None
                cells.append(f"{share.median:.0%}" if share else "")
        table.add_row(name, *cells)
    return table


def _speed(result: Result) -> str:
    if result.part.work.tokens:
        speed = result.tokens_per_second
        return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
    return format_value(result.spread.median, result.part.work)


def print_not_measured(results: Results, absent: Sequence[str], console: Console) -> None:
    """Print a line for each device that this machine lacks, and for each part without values."""
    for device in absent:
        console.print(f"NOT MEASURED: {device}: this machine has no {device}", style="yellow")
    for row in results.results:
        if not row.values:
            console.print(f"NOT MEASURED: {row.part}: {row.why}", style="yellow", markup=False)


def print_results(results: Results, console: Console) -> None:
    """Print one table per measurement, with one row per contestant and its work.

    A row has the median, the quartiles, the tokens per second, and the share of the limit: the
    shortest possible time divided by the contestant's time. For dtypes other than float32, a row
    also has the KL divergence from our model in float32. The last column has the contestant's peak
    memory for one token, if it was measured.
    """
    for rows in results.by_measurement():
        [title] = {row.measurement for row in rows.values()}
        table = FoldingTable(box=box.SIMPLE, title=title, title_justify="left", title_style="bold")
        table.add_column("work")
        table.add_column("contestant")
        table.add_column("dtype")
        for column in ("median", "quartiles", "tokens/s", "of limit", "KL", "memory"):
            table.add_column(column, justify="right")
        for part, row in rows.items():
            setup = part.setup
            work = f"{part.work}, {setup.model}" if setup.model != "small" else str(part.work)
            table.add_row(work, setup.contestant, setup.dtype, *_figures(results, row))
        console.print(table)


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
    needed = results.memory_of(row.part.setup) if work.tokens else None
    yield format_value(needed.spread.median, needed.part.work) if needed else ""


def print_goals(judged: Sequence[Judged], absent: Sequence[str], console: Console) -> None:
    """Print a table of the goals, with the bound, measured quotient, verdict and note of each.

    `absent` are the devices that this machine does not have.
    """
    table = FoldingTable(box=box.SIMPLE, title="goals", title_justify="left", title_style="bold")
    table.add_column("device")
    table.add_column("what")
    for column in ("goal", "measured", ""):
        table.add_column(column)
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
