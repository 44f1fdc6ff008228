"""`clean-transformer bench`."""

import tempfile
from collections.abc import Sequence
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
    """Measure our speed, that of other implementations, and the machine's limit.

    Then says which of our speed goals hold. Goals for devices that this
    machine does not have do not count.

    Exit status: 0 all goals hold, 1 a goal is missed, 2 could not run,
    3 a goal was not measured, 130 interrupted.
    """
    import torch

    from clean_transformer.benchmark.goals import goals
    from clean_transformer.benchmark.judge import exit_status, judge
    from clean_transformer.benchmark.plan import measurements, works
    from clean_transformer.benchmark.results.file import write_results
    from clean_transformer.benchmark.results.report import print_goals, print_results
    from clean_transformer.benchmark.results.results import Results
    from clean_transformer.benchmark.running.models import write_models
    from clean_transformer.benchmark.running.race import Race
    from clean_transformer.support.devices import choose_devices, is_available
    from clean_transformer.support.files import require_folder

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for path in (json, figures):
            if path is not None:
                require_folder(path)
        chosen = choose_devices(devices)
        present = [name for name in chosen if is_available(name)]
        planned = [one for name in present for one in measurements(name, works(name, quick))]
        sizes = {"tiny", "small"} | {p.entrant.model for one in planned for p in one.parts}
        n_threads = threads or torch.get_num_threads()
        with progress() as on_step:
            on_step("writing the weights")
            folders, missing = write_models(sorted(sizes), Path(folder))
        race = Race(folders, n_threads, hooked_python, missing)
        with progress(sum(one.turns for one in planned)) as on_step:
            on_step("starting the contestants", 0)
            turn = count(1)
            measured = race.run(planned, lambda part: on_step(str(part), next(turn)))
        results = Results(about(present, n_threads, quick), measured)
    judged = [judge(goal, results) for name in chosen for goal in goals(name, works(name, quick))]
    if json is not None:
        write_results(results, judged, json)
    print_results(results, console)
    print_goals(judged, [name for name in chosen if name not in present], console)
    if figures is not None:
        from clean_transformer.benchmark.results.figures import write_figures

        write_figures(results, figures)
    here = [one for one in judged if one.goal.device in present]
    raise typer.Exit(exit_status(here))


def about(devices: Sequence[str], threads: int, quick: bool) -> dict[str, str]:
    """What the run was measured on: versions, settings, processor."""
    import torch

    from clean_transformer.benchmark.running.models import processor
    from clean_transformer.reports.environment import device_settings, environment

    described = environment() | {"threads": str(threads), "run": "quick" if quick else "full"}
    for device in devices:
        for setting, value in device_settings(torch.device(device)).items():
            described[f"{device}: {setting}"] = value
    return described | {"processor": processor()}
