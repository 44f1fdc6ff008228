"""The results on a terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
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
        table = Table(title, "contestant", "dtype", "median", "quartiles", "tokens/s", "of limit")
        for result in rows:
            table.add_row(*_cells(results, result))
        console.print(table)


def _cells(results: Results, result: Result) -> Iterable[str]:
    part = result.part
    yield from (str(part.work), result.title or part.entrant.contestant, part.entrant.dtype)
    if not result.values:
        yield f"[yellow]NOT MEASURED[/]: {result.why}"
        return
    spread = result.spread
    unit = _megabytes if part.work.kind in BYTES else _seconds
    yield unit(spread.median)
    yield f"{unit(spread.low)} – {unit(spread.high)}"
    yield f"{result.tokens_per_second:,.0f}" if part.work.tokens else ""
    share = results.share_of_limit(result)
    yield f"{100 * share.median:.0f}%" if share else ""


def print_goals(judged: Sequence[Judged], console: Console) -> None:
    """The goals, what was measured, and why where that is not enough."""
    table = Table("what", "goal", "measured", "", "note")
    for one in judged:
        table.add_row(
            one.goal.what,
            one.goal.bound,
            "" if one.measured is None else one.goal.number(one.measured.median),
            f"[{COLORS[one.verdict]}]{one.verdict}[/]",
            one.note,
        )
    console.print(table)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"
