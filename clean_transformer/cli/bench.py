"""The command `clean-transformer bench`."""

from itertools import count
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from clean_transformer.cli import options
from clean_transformer.cli.terminal import progress


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure less, in about two minutes.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(help="Run these contestants only, such as ours,limit; judge no goals."),
    ] = None,
    devices: options.Devices = "cpu",
    threads: Annotated[
        int, typer.Option(help="Number of CPU threads; 0 leaves the choice to PyTorch.")
    ] = 0,
    hooked_python: Annotated[
        str | None,
        typer.Option(help="The Python of an environment that has transformer_lens 3.9.0."),
    ] = None,
    json: options.JsonFile = None,
    figures: Annotated[
        Path | None, typer.Option(help="Write figures as HTML pages in this folder.")
    ] = None,
) -> None:
    """Measure the speed of this package and of other implementations, and the machine's limit.

    Then says which of our speed goals are met. Goals for devices that this
    machine does not have are ignored.

    Exit status: 0 = all goals are met, 1 = a goal is missed,
    2 = could not run, 3 = a goal was not measured, 130 = interrupted.
    With --only: 0 = everything was measured, 3 = something was not.
    """
    from clean_transformer.benchmark.results.file import write_results
    from clean_transformer.benchmark.results.terminal import print_goals, print_results
    from clean_transformer.benchmark.suite import Benchmark
    from clean_transformer.support.devices import choose_devices
    from clean_transformer.support.files import require_folder

    require_folder(json, figures)
    if figures is not None:
        from clean_transformer.benchmark.results.figures import write_figures
    contestants = None if only is None else [name.strip() for name in only.split(",")]
    benchmark = Benchmark(choose_devices(devices), quick=quick, only=contestants)
    with progress(benchmark.turns) as on_step:
        on_step("writing the weights", 0)
        turn = count(1)
        report = benchmark.run(threads, hooked_python, lambda part: on_step(str(part), next(turn)))
    if json is not None:
        write_results(report.results, report.judged or [], json)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    print_results(report.results, console)
    if report.judged is not None:
        print_goals(report.judged, report.absent, console)
    if figures is not None:
        write_figures(report.results, figures)
    raise typer.Exit(report.exit_status)
