"""What every command does alike: read its text, show progress, and end with one line on errors."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from clean_transformer.training.checkpoint import Measured


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End with status 2 and one line where a job cannot be done, with 130 where it is broken off.

    A reader of the output that wants no more of it, as `head`, is no error of ours.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"error: {reason}", style="red", markup=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("\nstopped")
        raise typer.Exit(130) from None


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A bar on a terminal's standard error that says what is being done, and for how long."""
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda step: bar.update(task, description=step)


def read_text(text: str | None, file: Path | None) -> str:
    """The text itself; or that of a file; or of standard input, for "-" or where it is piped in.

    Without the line break at the end of a file or of what is piped, which no one means to say.
    Raises `ValueError` for two texts, for none, and for one that is not UTF-8.
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


@contextmanager
def training_bar(steps: int) -> Iterator[Callable[["Measured"], None]]:
    """A bar on a terminal's standard error: the loss, tokens per second, and the time left."""
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def on_step(measured: "Measured") -> None:
            said = f"loss {measured.loss:.3f}, {measured.tokens_per_second:,.0f} tokens/s, left:"
            if not bar.tasks:  # a run that goes on does not begin at 0, nor did it come there now
                bar.add_task(said, total=steps, completed=measured.step)
            bar.update(bar.tasks[0].id, completed=measured.step, description=said)

        yield on_step
