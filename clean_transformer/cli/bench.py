"""The command `bench`: measure our speed beside other libraries and the machine's limit."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clean_transformer.benchmark.running.race import OnTurn
from clean_transformer.benchmark.suite import Benchmark
from clean_transformer.cli.terminal import one_line_errors
from clean_transformer.support.devices import choose_devices
from clean_transformer.support.files import require_folder


@contextmanager
def turns_bar(turns: int) -> Iterator[OnTurn]:
    """A bar on a terminal's standard error that says whose turn it is."""
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("writing the weights", total=turns)
        yield lambda part: bar.update(task, advance=1, description=str(part))


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Do less work, in about two minutes.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(help="Run these contestants only, such as ours,limit; judge no goals."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, all, or some: cpu,cuda,mps")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 for PyTorch's choice.")] = 0,
    hooked_python: Annotated[
        str | None, typer.Option(help="The Python of an environment with transformer_lens 3.9.0.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Write figures in this folder, as HTML pages.")
    ] = None,
) -> None:
    """Measure our speed beside other libraries and the machine's limit, and judge the goals.

    Exit status: 0 all goals hold, 1 one is missed, 2 could not run, 3 one was not measured although
    its device is here. With --only: 0 all was measured, 2 could not run, 3 something was not.
    """
    from clean_transformer.benchmark.results.file import write_results
    from clean_transformer.benchmark.results.terminal import print_goals, print_results

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    with one_line_errors():
        for path in (json, figures):
            if path is not None:
                require_folder(path)
        benchmark = Benchmark(
            choose_devices(device),
            quick=quick,
            only=None if only is None else [name.strip() for name in only.split(",")],
        )
        with turns_bar(benchmark.turns) as on_turn:
            report = benchmark.run(threads, hooked_python, on_turn)
    if json is not None:
        write_results(report.results, report.judged or [], json)
    print_results(report.results, console)
    if report.judged is not None:
        print_goals(report.judged, report.absent, console)
    if figures is not None:
        from clean_transformer.benchmark.results.figures import write_figures

        write_figures(report.results, figures)
    raise typer.Exit(report.exit_status)
