"""The command that compares two runs of the benchmark."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from clean_transformer.benchmark.results.comparison import compare as compare_results
from clean_transformer.benchmark.results.file import read_results
from clean_transformer.cli.terminal import one_line_errors


def compare(
    before: Annotated[Path, typer.Argument(help="What `bench --json` wrote.")],
    after: Annotated[Path, typer.Argument(help="The same, later.")],
) -> None:
    """Say what got slower. Exit status: 0 nothing, 1 something, 2 they cannot be compared."""
    console = Console()
    with one_line_errors():
        drift, changes = compare_results(read_results(before), read_results(after))
    table = Table("measurement", "what", "time", "noise", "", box=box.SIMPLE)
    for change in sorted(changes, key=lambda change: -change.factor):
        color = {"slower": "red", "faster": "green"}.get(change.verdict, "default")
        cells = (change.measurement, str(change.part), f"× {change.factor:.2f}")
        table.add_row(*cells, f"± {change.noise:.0%}", f"[{color}]{change.verdict}[/]")
    console.print(table)
    slower = sum(change.verdict == "slower" for change in changes)
    console.print(
        f"{slower} of {len(changes)} got slower, beside others, whose time is × {drift:.2f}"
    )
    raise typer.Exit(1 if slower else 0)
