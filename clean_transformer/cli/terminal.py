"""Functions for several commands: read a text, show progress, print tables, JSON and errors."""

import codecs
import io
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from clean_transformer.reports.terminal import FoldingTable
from clean_transformer.support.files import STANDARD_OUTPUT, write_atomically
from clean_transformer.support.printable import in_ascii, printable

# Our own errors, and those of the system, are of these kinds; their text is enough.
EXPECTED = (ValueError, OSError, RuntimeError, ImportError)

# The width of a file, in characters. No line is as long, so that no line is broken.
WIDTH_OF_FILES = 10_000

# Standard error, if it is not a terminal, gets at most one line of progress per so many seconds.
SECONDS_PER_LINE = 5.0


def never_fail_to_print() -> None:
    """Let this process print every character, whatever the encoding of its output is.

    A terminal or a file whose encoding lacks a character, such as "≤" in cp1252, gets ASCII instead
    (see `in_ascii`).
    """

    def handle(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        return in_ascii(error.object[error.start : error.end]), error.end

    codecs.register_error("in_ascii", handle)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="in_ascii")


def open_console(*, stderr: bool = False) -> Console:
    """Return a console for standard output, or for standard error.

    Only in a terminal, long lines are broken to fit the width.
    """
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=WIDTH_OF_FILES)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print an error in the `with` block as one line on standard error, and exit with status 2.

    This function catches every kind of error, so that no command exits with Python's status 1. For
    an unexpected kind of error, the line also says where in the code it was raised. After Ctrl-C,
    the exit status is 130. If the program that reads our output, such as `head`, has ended, nothing
    is printed, and the exit status is 2.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # some errors, for example of a full disk, show only here
    except (typer.Exit, typer.BadParameter):
        raise
    except KeyboardInterrupt:
        Console(stderr=True).print("\nstopped")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # Python flushes the output again when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(2) from None
    except BaseException as error:  # a panic in Rust code is a BaseException
        if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
            raise typer.Exit(2) from None  # raised by rich, whose output had no reader any more
        reason = printable(" ".join(in_words(error).split()))
        print_message(f"error: {reason}", style="red")
        raise typer.Exit(2) from None


def print_message(message: str, style: str) -> None:
    """Print one line on standard error. A terminal breaks the line between words."""
    console = Console(stderr=True)
    soft_wrap = not console.is_terminal  # leave the line whole
    console.print(message, style=style, markup=False, soft_wrap=soft_wrap)


def in_words(error: BaseException) -> str:
    """Return the message of an error. For an unexpected kind of error, add its type and its place.

    The place is the file and the line in which the error was raised.
    """
    if isinstance(error, MemoryError):
        return f"there is not enough memory; {error}".removesuffix("; ")
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, EXPECTED) and str(error):
        return str(error)
    *_, place = traceback.extract_tb(error.__traceback__)
    file = Path(place.filename).name
    return f"{type(error).__name__}: {error} ({file}, line {place.lineno})"


class Bar(Progress):
    """A progress bar, below what the function `above` returns."""

    above: Callable[[], RenderableType] | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield what `above` returns, and then the progress bar."""
        if self.above is not None:
            yield self.above()
        yield from super().get_renderables()


@contextmanager
def progress(
    total: int | None = None,
    *,
    stays: bool = True,
    logged: bool = False,
    above: Callable[[], RenderableType] | None = None,
) -> Iterator[Callable[..., None]]:
    """Show a progress bar on standard error, and yield a function `on_step(what, done)`.

    `on_step` changes the bar: `what` is the text beside the bar, and `done` is the number of
    finished steps. If `total`, the number of all steps, is given, the bar shows the remaining time,
    and stays on the screen at the end unless `stays` is False. If `total` is None, the bar shows
    the elapsed time and disappears at the end, and `done` can be left out. If standard error is not
    a terminal, there is no bar. With `logged`, there are lines instead: for the first and the last
    step, and for other steps at most every `SECONDS_PER_LINE` seconds. `above` returns what is
    shown above the bar, such as a table.
    """
    what = TextColumn("{task.description}")
    columns: list[ProgressColumn] = [BarColumn(bar_width=20), what, TimeElapsedColumn()]
    if total is not None:
        columns[1:] = [MofNCompleteColumn(), what, TimeRemainingColumn()]
    console = Console(stderr=True)
    with Bar(
        *columns,
        console=console,
        transient=total is None or not stays,
        disable=not console.is_terminal,
    ) as bar:
        bar.above = above
        last_line = -math.inf

        def on_step(what: str, done: int | None = None) -> None:
            nonlocal last_line
            due = done == total or time.monotonic() - last_line >= SECONDS_PER_LINE
            if logged and not console.is_terminal and due:
                last_line = time.monotonic()
                print(f"{done}/{total} {what}", file=sys.stderr, flush=True)
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
    is a terminal, if the text is empty, or if it is not in UTF-8.
    """
    if text is not None and file is not None:
        raise ValueError("there are two texts, an argument and a --file; give one")
    if file is None and text not in (None, "-"):
        return not_empty(argument_in_utf8(text))
    if file is None and text is None and sys.stdin.isatty():
        raise ValueError("there is no text; give one as an argument, as --file or by a pipe")
    source = "standard input" if file is None else str(file)
    read = decode(sys.stdin.buffer.read() if file is None else file.read_bytes(), source)
    return not_empty(read.removesuffix("\n").removesuffix("\r"))


def not_empty(text: str) -> str:
    """Return `text`. Raises `ValueError` if it is empty."""
    if not text:
        raise ValueError("the text is empty; give at least one character")
    return text


def argument_in_utf8(text: str) -> str:
    """Return the argument `text`, decoded from UTF-8 even if Python decoded it from ASCII."""
    try:
        text.encode()
    except UnicodeEncodeError:  # with LC_ALL=C, Python keeps other bytes as lone surrogates
        return decode(os.fsencode(text), "the text")
    return text


def decode(content: bytes, source: str) -> str:
    """Return `content`, decoded from UTF-8. `source` is the name of the content in an error."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 ({error}); convert it first") from None


def print_text(text: str, end: str = "\n") -> None:
    """Print `text` at once. In a terminal, escape the characters that control the terminal."""
    if sys.stdout.isatty():
        text = printable(text, keep="\n\t")
    print(text, end=end, flush=True)


def write_reproduction(file: Path, script: str) -> None:
    """Write a script that reproduces a fault; if this fails, print the reason on standard error.

    The current folder, where the script belongs, may be read-only.
    """
    try:
        write_atomically(file, script)
    except OSError as error:
        print_message(f"note: {file} was not written: {error}", style="yellow")


def print_written(*files: Path | None) -> None:
    """Print the name of each file that a command wrote; None stands for no file."""
    output = sys.stderr if STANDARD_OUTPUT in files else sys.stdout
    for file in files:
        if file not in (None, STANDARD_OUTPUT):
            print(f"wrote {file}", file=output)


def write_json(file: Path, **values: Any) -> None:
    """Write `values` to `file` as one JSON object. Raises `ValueError` for NaN and infinity."""
    write_atomically(file, json.dumps(values, allow_nan=False) + "\n")


def print_table(title: str, columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    """Print a table. Floats are printed with four significant digits, and None as an empty cell."""
    table = FoldingTable(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "token" else "right")
    for row in rows:
        table.add_row(*(Text(format_cell(cell)) for cell in row))
    open_console().print(table)


def format_cell(value: str | int | float | None) -> str:
    """Return a value as text: a float with four significant digits, and None as ""."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))
