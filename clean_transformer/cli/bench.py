"""The command that measures speed: ours beside its peers and the machine's limit, in one run."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from clean_transformer.benchmark.goals import goals
from clean_transformer.benchmark.judge import exit_status, judge
from clean_transformer.benchmark.plan import measurements, works
from clean_transformer.benchmark.results.file import write_results
from clean_transformer.benchmark.results.report import print_goals, print_results
from clean_transformer.benchmark.results.results import Results
from clean_transformer.benchmark.running.models import processor, write_models
from clean_transformer.benchmark.running.race import OnTurn, Race
from clean_transformer.cli.terminal import one_line_errors, progress
from clean_transformer.reports.environment import device_settings, environment
from clean_transformer.support.devices import choose_devices, is_available
from clean_transformer.support.files import require_folder


@contextmanager
def bar(turns: int) -> Iterator[OnTurn]:
    """A bar on a terminal's standard error that says whose turn it is."""
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting the contestants", total=turns)
        yield lambda part: progress.update(task, advance=1, description=str(part))


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes, with less work.")] = False,
    device: Annotated[str, typer.Option(help="auto, all, or some: cpu,cuda,mps")] = "cpu",
    threads: Annotated[int, typer.Option(help="Of the CPU; 0 for PyTorch's choice.")] = 0,
    hooked_python: Annotated[
        str | None, typer.Option(help="The Python of an environment with transformer_lens 3.9.0.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Write figures in this folder, as HTML pages.")
    ] = None,
) -> None:
    """Measure ours, its peers and the machine's limit in one run, and judge the goals.

    Exit status: 0 all goals of the devices that are here hold, 1 one is missed, 2 could not run,
    3 one was not measured, though its device is here.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    with one_line_errors(), tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for path in (json, figures):
            if path is not None:
                require_folder(path)
        devices = choose_devices(device)
        present = [name for name in devices if is_available(name)]
        planned = [one for name in present for one in measurements(name, works(name, quick))]
        sizes = {"tiny", "small"} | {p.entrant.model for one in planned for p in one.parts}
        n_threads = threads or torch.get_num_threads()
        with progress() as on_step:
            on_step("writing the weights")
            folders, missing = write_models(sorted(sizes), Path(folder))
        race = Race(folders, n_threads, hooked_python, missing)
        with bar(sum(one.turns for one in planned)) as on_turn:
            measured = race.run(planned, on_turn)
        results = Results(about(present, n_threads, quick), measured)
    judged = [judge(goal, results) for name in devices for goal in goals(name, works(name, quick))]
    if json is not None:
        write_results(results, judged, json)
    print_results(results, console)
    print_goals(judged, [name for name in devices if name not in present], console)
    if figures is not None:
        from clean_transformer.benchmark.results.figures import write_figures

        write_figures(results, figures)
    here = [one for one in judged if one.goal.device in present]
    raise typer.Exit(exit_status(here))


def about(devices: Sequence[str], threads: int, quick: bool) -> dict[str, str]:
    """What the run was on."""
    described = environment() | {"threads": str(threads), "run": "quick" if quick else "full"}
    for device in devices:
        for setting, value in device_settings(torch.device(device)).items():
            described[f"{device}: {setting}"] = value
    return described | {"processor": processor()}
