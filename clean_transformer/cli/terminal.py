"""Functions for several commands: read a text, show progress, print tables, JSON and errors."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error in the `with` block as one line on standard error, and exit with status 2.

    After Ctrl-C, the exit status is 130. `BrokenPipeError` is raised unchanged. This error means
    that the program that reads our output, such as `head`, has ended.
    """
    try:
        yield
    except (BrokenPipeError, typer.Exit):
        raise
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"error: {reason}", style="red", markup=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("\nstopped")
        raise typer.Exit(130) from None


@contextmanager
def progress(total: int | None = None, *, stays: bool = True) -> Iterator[Callable[..., None]]:
    """Show a progress bar on standard error, and yield a function `on_step(what, done)`.

    `on_step` changes the bar: `what` is the text beside the bar, and `done` is the number of
    finished steps. If `total`, the number of all steps, is given, the bar shows the remaining time,
    and stays on the screen at the end unless `stays` is False. Without `total`, `done` is not
    needed; the bar shows the elapsed time, and disappears at the end. If standard error is not a
    terminal, nothing is shown.
    """
    what, time = TextColumn("{task.description}"), TimeElapsedColumn()
    columns: list[ProgressColumn] = [BarColumn(bar_width=20), what, time]
    if total is not None:
        columns[1:] = [MofNCompleteColumn(), what, TimeRemainingColumn()]
    console = Console(stderr=True)
    with Progress(
        *columns,
        console=console,
        transient=total is None or not stays,
        disable=not console.is_terminal,
    ) as bar:

        def on_step(what: str, done: int | None = None) -> None:
            if not bar.tasks:
                # A resumed training run starts at the step of its checkpoint. The bar starts at the
                # same step, so that the remaining time is estimated from the new steps only.
                bar.add_task(what, total=total, completed=done or 0)
            bar.update(bar.tasks[0].id, completed=done, description=what)

        yield on_step


def read_text(text: str | None, file: Path | None) -> str:
    """Return the text for a command: `text` itself, or the text in `file` or on standard input.

    Standard input is read if `text` is "-", or if neither `text` nor `file` is given. One line
    break at the end of the file or of standard input is removed.

    Raises `ValueError` if `text` and `file` are both given, if neither is given and standard input
    is a terminal, or if the file or standard input is not UTF-8.
    """
    if text is not None and file is not None:
        raise ValueError("there are two texts, an argument and a --file; give one")
    if file is None and text not in (None, "-"):
        return text
    if file is None and text is None and sys.stdin.isatty():
        raise ValueError("there is no text; give one as an argument, as --file or by a pipe")
    source = "standard input" if file is None else str(file)
    try:
        read = (sys.stdin.buffer.read() if file is None else file.read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 ({error}); convert it first") from None
    return read.removesuffix("\n").removesuffix("\r")


def print_json(**values: Any) -> None:
    """Print `values` as one JSON object. Raises `ValueError` for NaN and infinity."""
    print(json.dumps(values, allow_nan=False))


def print_table(title: str, columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    """Print a table. Floats are printed with four significant digits, and None as an empty cell."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "token" else "right")
    for row in rows:
        table.add_row(*(Text(format_cell(cell)) for cell in row))
    Console().print(table)


def format_cell(value: str | int | float | None) -> str:
    """Return a value as text for a cell of a table (see `print_table`)."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
