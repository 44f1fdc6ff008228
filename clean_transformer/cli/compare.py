"""The command `clean-transformer compare`."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table


def compare(
    before: Annotated[Path, typer.Argument(help="Results that `bench --json` wrote.")],
    after: Annotated[Path, typer.Argument(help="Results of a later run.")],
) -> None:
    """Compare two runs of the benchmark, and say what got slower.

    Exit status: 0 nothing got slower, 1 something got slower,
    2 could not compare.
    """
    from clean_transformer.benchmark.results.comparison import compare
    from clean_transformer.benchmark.results.file import read_results

    drift, changes = compare(read_results(before), read_results(after))
    table = Table("measurement", "what", "time", "noise", "", box=box.SIMPLE)
    for change in sorted(changes, key=lambda change: -change.factor):
        color = {"slower": "red", "faster": "green"}.get(change.verdict, "default")
        cells = (change.measurement, str(change.part), f"× {change.factor:.2f}")
        table.add_row(*cells, f"± {change.noise:.0%}", f"[{color}]{change.verdict}[/]")
    console = Console()
    console.print(table)
    slower = sum(change.verdict == "slower" for change in changes)
    console.print(
        f"{slower} of {len(changes)} got slower. The times are relative to those of the other "
        f"implementations, which changed × {drift:.2f}."
    )
    raise typer.Exit(1 if slower else 0)
