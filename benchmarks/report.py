"""The results on a terminal."""

from collections import Counter
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.judge import Judged
from benchmarks.results import Result, Results
from benchmarks.work import BYTES

COLORS = {"HELD": "green", "MISSED": "red", "NOT MEASURED": "yellow"}


def print_results(results: Results, console: Console) -> None:
    """A table for each measurement: what each contestant did, and how near the limit that is."""
    titles = dict.fromkeys(result.measurement for result in results.results)
    for title in titles:
        rows = [result for result in results.results if result.measurement == title]
        columns = ("contestant", "dtype", "median", "quartiles", "tokens/s", "of limit")
        table = Table(title, *columns, box=box.SIMPLE)
        for result in rows:
            table.add_row(*_cells(results, result))
        console.print(table)


def _cells(results: Results, result: Result) -> Iterable[str]:
    part = result.part
    yield from (str(part.work), result.title or part.entrant.contestant, part.entrant.dtype)
    if not result.values:
        yield f"[yellow]NOT MEASURED[/]: {escape(result.why)}"
        return
    spread = result.spread
    unit = _megabytes if part.work.kind in BYTES else _seconds
    yield unit(spread.median)
    yield f"{unit(spread.low)} – {unit(spread.high)}"
    yield f"{result.tokens_per_second:,.0f}" if part.work.tokens else ""
    share = results.share_of_limit(result)
    yield f"{100 * share.median:.0f}%" if share else ""


def print_goals(judged: Sequence[Judged], absent: Sequence[str], console: Console) -> None:
    """The goals, what was measured, and why where that is not enough."""
    table = Table("device", "what", "goal", "measured", "quartiles", "", "note", box=box.SIMPLE)
    for one in judged:
        number, measured = one.goal.number, one.measured
        table.add_row(
            one.goal.device,
            one.goal.what,
            one.goal.bound,
            number(measured.median) if measured else "",
            f"{number(measured.low)} – {number(measured.high)}" if measured else "",
            f"[{COLORS[one.verdict]}]{one.verdict}[/]",
            "there is no such device here" if one.goal.device in absent else escape(one.note),
        )
    console.print(table)
    count = Counter(one.verdict for one in judged)
    console.print(", ".join(f"{count[verdict]} {verdict}" for verdict in COLORS if count[verdict]))


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"
