"""The command `clean-transformer compare`."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from clean_transformer.parity.report.comparison import Change

# How many changed errors are printed without --rows. Changed verdicts of uses are always printed.
SHOWN = 10
COLORS = {"slower": "red", "worse": "red", "faster": "green", "better": "green"}


def compare(
    before: Annotated[
        Path, typer.Argument(help="A report that `parity`, `doctor` or `bench` wrote with --json.")
    ],
    after: Annotated[Path, typer.Argument(help="A later report of the same kind.")],
    rows: Annotated[bool, typer.Option("--rows", help="Print every change.")] = False,
) -> None:
    """Compare two reports: what changed in the build, and what got worse or slower.

    Exit status: 0 nothing got worse, 1 something got worse,
    2 could not compare.
    """
    from clean_transformer.benchmark.results.file import SCHEMA as BENCH
    from clean_transformer.parity.report.json import SCHEMA as PARITY
    from clean_transformer.reports.plain import read_report

    kinds: dict[str, Callable[[Path, Path, bool, Console], bool]] = {
        PARITY.name: _compare_parity,
        BENCH.name: _compare_benchmarks,
    }
    kind, other = (read_report(file)["schema"] for file in (before, after))
    if kind != other or kind not in kinds:
        raise ValueError(
            f"{before} has the format {kind}, and {after} the format {other}; compare two reports "
            f"of one of these formats: {', '.join(kinds)}"
        )
    try:
        got_worse = kinds[kind](before, after, rows, Console())
    except (KeyError, TypeError) as error:
        raise ValueError(f"{before} or {after} is damaged: {error!r}") from None
    raise typer.Exit(1 if got_worse else 0)


def _compare_parity(before: Path, after: Path, rows: bool, console: Console) -> bool:
    from clean_transformer.parity.report.comparison import compare_reports
    from clean_transformer.parity.report.json import read_json

    found = compare_reports(read_json(before), read_json(after))
    _print_build(found.build, console)
    for sentence in found.not_compared:
        console.print(f"Not compared: {sentence}", style="yellow", markup=False)
    for verdict in ("worse", "better"):
        changes = found.those(verdict)
        if changes:
            with_errors = [change for change in changes if not math.isnan(change.after.ratio)]
            left_out = [] if rows else with_errors[SHOWN:]
            shown = [change for change in changes if change not in left_out]
            console.print(Text(f"{len(changes)} {verdict}", style=COLORS[verdict]))
            console.print(_changes_table(shown))
            if left_out:
                console.print(f"… and {len(left_out)} more; --rows prints all")
    worse, better = (len(found.those(verdict)) for verdict in ("worse", "better"))
    said = f"{worse} got worse, {better} got better" if worse or better else "nothing changed"
    console.print(f"{len(found.changes):,} results compared: {said}.")
    return worse > 0


def _compare_benchmarks(before: Path, after: Path, rows: bool, console: Console) -> bool:
    from clean_transformer.benchmark.results.comparison import compare
    from clean_transformer.benchmark.results.file import read_results
    from clean_transformer.reports.environment import differences

    old, new = read_results(before), read_results(after)
    drift, changes = compare(old, new)
    _print_build(differences(old.environment, new.environment), console)
    table = Table("measurement", "what", "time", "noise", "", box=box.SIMPLE)
    for change in sorted(changes, key=lambda change: -change.factor):
        cells = (change.measurement, str(change.part), f"× {change.factor:.2f}")
        table.add_row(*cells, f"± {change.noise:.0%}", _colored(change.verdict))
    console.print(table)
    slower = sum(change.verdict == "slower" for change in changes)
    console.print(
        f"{slower} of {len(changes)} got slower. The times are relative to those of the other "
        f"implementations, which changed × {drift:.2f}."
    )
    return slower > 0


def _print_build(changed: list[tuple[str, str, str]], console: Console) -> None:
    if not changed:
        console.print("Versions, processor and settings are the same.")
        return
    table = Table(box=box.SIMPLE)
    for title in ("versions, processor, settings", "before", "after"):
        table.add_column(title, overflow="fold")
    for row in changed:
        table.add_row(*map(Text, row))
    console.print(table)


def _changes_table(changes: "list[Change]") -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("where", overflow="fold")
    for title in ("verdict", "error, in roundings", "correct bits"):
        table.add_column(title)
    for change in changes:
        place, old, new = change.place, change.before, change.after
        what = f"{place.run} {place.what}" + (f": {place.where}" if place.where else "")
        operation = f" ({place.operation})" if place.operation else ""
        same = old.verdict is new.verdict
        verdicts = new.verdict.value if same else f"{old.verdict.value} → {new.verdict.value}"
        table.add_row(
            Text(what + operation),
            Text(verdicts, style=COLORS[change.verdict]),
            _step(old.ratio, new.ratio, ".3g"),
            _step(old.bits, new.bits, ".1f"),
        )
    return table


def _step(old: float, new: float, form: str) -> str:
    return "" if math.isnan(new) else f"{old:{form}} → {new:{form}}"


def _colored(verdict: str) -> Text:
    return Text(verdict, style=COLORS.get(verdict, ""))
