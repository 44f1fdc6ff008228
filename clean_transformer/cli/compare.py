"""The command `clean-transformer compare`."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.text import Text

from clean_transformer.cli.terminal import open_console
from clean_transformer.reports.terminal import FoldingTable

if TYPE_CHECKING:
    from clean_transformer.parity.report.comparison import Change

# How many changed errors of a run are printed without --rows.
SHOWN = 8
COLORS = {"slower": "red", "worse": "red", "faster": "green", "better": "green"}


def compare(
    before: Annotated[
        Path, typer.Argument(help="A report that `parity`, `doctor` or `bench` wrote with --json.")
    ],
    after: Annotated[Path, typer.Argument(help="A later report of the same kind.")],
    rows: Annotated[bool, typer.Option("--rows", help="Print every change.")] = False,
) -> None:
    """Compare two reports: which versions and settings changed, and what got worse or slower.

    Exit status: 0 = nothing got worse, 1 = something got worse,
    2 = could not compare.
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
        got_worse = kinds[kind](before, after, rows, open_console())
    except Exception as error:  # a damaged report can raise every kind of exception
        known = isinstance(error, ValueError)
        if known and any(str(file) in str(error) for file in (before, after)):
            raise
        problem = error if known else f"{error!r}, so one is damaged"
        raise ValueError(f"{before} and {after} cannot be compared: {problem}") from None
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
        for run in dict.fromkeys(change.place.run for change in changes):
            in_run = [change for change in changes if change.place.run == run]
            console.print(Text(f"{run}: {len(in_run)} {verdict}", style=COLORS[verdict]))
            _print_changes(in_run, rows, console)
    worse, better = (len(found.those(verdict)) for verdict in ("worse", "better"))
    said = f"{worse} got worse, {better} got better" if worse or better else "nothing changed"
    console.print(f"{len(found.changes):,} results compared: {said}.")
    return worse > 0


def _compare_benchmarks(before: Path, after: Path, rows: bool, console: Console) -> bool:
    from clean_transformer.benchmark.results.comparison import compare, missing
    from clean_transformer.benchmark.results.file import read_results
    from clean_transformer.reports.environment import differences

    old, new = read_results(before), read_results(after)
    drift, changes = compare(old, new)
    _print_build(differences(old.environment, new.environment), console)
    table = FoldingTable("measurement", "what", "time", "noise", "", box=box.SIMPLE)
    for change in sorted(changes, key=lambda change: -change.factor):
        cells = (change.measurement, str(change.part), f"× {change.factor:.2f}")
        table.add_row(*map(Text, cells), f"± {change.noise:.0%}", _colored(change.verdict))
    console.print(table)
    absent = missing(old, new)
    for each in absent:
        console.print(
            Text(
                f"{each.measurement}, {each.part}: {each.why}",
                style=COLORS["worse"] if each.failed else "yellow",
            )
        )
    slower = sum(change.verdict == "slower" for change in changes)
    failed = sum(each.failed for each in absent)
    console.print(
        f"{slower} of {len(changes)} got slower"
        + (f", and {failed} failed. " if failed else ". ")
        + (
            "Both runs measured no other implementation in the same version, so how much the "
            "machine's own speed changed is unknown."
            if drift is None
            else "The times are relative to those of the other implementations, which changed "
            f"× {drift:.2f}."
        )
    )
    return slower > 0 or failed > 0


def _print_build(changed: list[tuple[str, str, str]], console: Console) -> None:
    if not changed:
        console.print("Versions, processor and settings are the same.")
        return
    table = FoldingTable(box=box.SIMPLE)
    for title in ("versions, processor, settings", "before", "after"):
        table.add_column(title)
    for row in changed:
        table.add_row(*map(Text, row))
    console.print(table)


def _print_changes(changes: "list[Change]", all_rows: bool, console: Console) -> None:
    with_errors = []
    for change in changes:
        if math.isnan(change.after.ratio):
            where = f"{change.place.what} {change.place.where}".strip()
            console.print(f"  {where}: {_verdicts(change)}", markup=False, highlight=False)
        else:
            with_errors.append(change)
    if not with_errors:
        return
    kinds = Counter(change.place.operation or change.place.what for change in with_errors)
    counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    console.print(f"  errors, by operation: {counts}", markup=False, highlight=False)
    shown = with_errors if all_rows else with_errors[:SHOWN]
    for change in shown:
        place, old, new = change.place, change.before, change.after
        operation = f" ({place.operation})" if place.operation else ""
        where = f"  {place.what} {place.where}{operation}"
        said = f"error {old.ratio:.3g} → {new.ratio:.3g} roundings"
        if math.isfinite(old.bits - new.bits):
            said += f", {old.bits:.1f} → {new.bits:.1f} correct bits"
        console.print(f"{where}\n    {_verdicts(change)}: {said}", markup=False, highlight=False)
    if len(shown) < len(with_errors):
        console.print(f"  … and {len(with_errors) - len(shown)} more; --rows prints all")


def _verdicts(change: "Change") -> str:
    old, new = change.before.verdict, change.after.verdict
    return new.value if old is new else f"{old.value} → {new.value}"


def _colored(verdict: str) -> Text:
    return Text(verdict, style=COLORS.get(verdict, ""))
