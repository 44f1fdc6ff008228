"""The command `clean-transformer bench`."""

import math
from itertools import count
from pathlib import Path
from shutil import which
from typing import Annotated, Any

import typer

from clean_transformer.cli import options
from clean_transformer.cli.terminal import open_console, print_written, progress
from clean_transformer.support.files import STANDARD_OUTPUT

WORK = "What is measured (not with --goals)"


def bench(
    only: Annotated[
        str | None,
        typer.Option(help="Measure these contestants only, such as ours,limit; judge no goals."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Number of texts. Default: 1.", rich_help_panel=WORK),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in each text. Default: 128.", rich_help_panel=WORK),
    ] = None,
    new: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens to generate after each text. Default: 32.", rich_help_panel=WORK
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16 or int8. Default: float32.", rich_help_panel=WORK
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="A published size: small, medium, large or xl. Default: small.",
            rich_help_panel=WORK,
        ),
    ] = None,
    devices: options.Devices = "cpu",
    threads: Annotated[
        int, typer.Option(min=0, help="Number of CPU threads; 0 leaves the choice to PyTorch.")
    ] = 0,
    goals: Annotated[
        bool,
        typer.Option(
            "--goals", help="Measure everything, and say which speed goals of this project hold."
        ),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Like --goals, but less, in about two minutes.")
    ] = False,
    hooked_python: Annotated[
        str | None,
        typer.Option(help="The Python of an environment that has transformer_lens 3.9.0."),
    ] = None,
    json: options.JsonFile = None,
    figures: Annotated[
        Path | None, typer.Option(help="Write figures as HTML pages in this folder.")
    ] = None,
) -> None:
    """Measure how fast GPT-2 reads and writes here: ours, Hugging Face's, and the machine's limit.

    Takes a minute or two. With --goals, measures everything in 15 minutes.

    Exit status: 0 = everything was measured (with --goals: all goals hold),
    1 = a goal is missed, 2 = could not run, 3 = something was not measured,
    130 = interrupted.
    """
    work: dict[str, Any] = {
        "batch": batch,
        "length": length,
        "new": new,
        "dtype": dtype,
        "size": size,
    }
    work = {name: value for name, value in work.items() if value is not None}
    goals = goals or quick
    if goals and work:
        raise ValueError(f"--goals measures work of its own; leave out --{', --'.join(work)}")
    if hooked_python is not None and which(hooked_python) is None:
        raise ValueError(f"--hooked-python {hooked_python} is not a program")
    with progress() as on_step:
        on_step("loading PyTorch")
        from clean_transformer.benchmark.question import Question, expected_seconds
        from clean_transformer.benchmark.results.data import Result, Results
        from clean_transformer.benchmark.results.file import write_results
        from clean_transformer.benchmark.results.terminal import (
            print_goals,
            print_not_measured,
            print_results,
            speed_table,
        )
        from clean_transformer.benchmark.suite import Benchmark
        from clean_transformer.support.devices import choose_devices
        from clean_transformer.support.files import require_folder, require_output_folder

        require_folder(json)
        if figures is not None:
            require_output_folder(figures)
            from clean_transformer.benchmark.results.figures import write_figures
        question = None if goals else Question(**work)
        contestants = None if only is None else [name.strip() for name in only.split(",")]
        benchmark = Benchmark(
            choose_devices(devices), quick=quick, only=contestants, question=question
        )
        on_step("estimating the time")
        minutes = expected_seconds(benchmark.measurements) / 60
    so_far = Results({}, [])
    title = "" if question is None else str(question)
    with progress(
        benchmark.turns,
        stays=False,
        logged=True,
        above=lambda: speed_table(so_far, title) if question else "",
    ) as on_step:
        on_step(f"writing the weights; all takes about {math.ceil(minutes)} min", 0)
        turn = count(1)

        def keep(results: list[Result]) -> None:
            nonlocal so_far
            so_far = Results({}, [*results])

        report = benchmark.run(
            threads, hooked_python, lambda part: on_step(str(part), next(turn)), keep
        )
    try:
        if json is not None:
            write_results(report.results, report.judged or [], json)
        if figures is not None:
            write_figures(report.results, figures)
    finally:  # a full disk does not hide the results
        console = open_console(stderr=json == STANDARD_OUTPUT)
        if question is not None and report.results.results:
            console.print(speed_table(report.results, title))
        elif question is None:
            print_results(report.results, console)
        print_not_measured(report.results, report.absent, console)
        if report.judged is not None:
            print_goals(report.judged, report.absent, console)
    print_written(json, figures)
    raise typer.Exit(report.exit_status)
