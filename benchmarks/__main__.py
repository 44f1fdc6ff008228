"""The benchmark: ours beside its peers and the machine's limit, in one run.

python -m benchmarks --quick
python -m benchmarks --json results.json --html figures.html
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.goals import goals
from benchmarks.judge import judge
from benchmarks.plan import FULL, QUICK, measurements
from benchmarks.report import print_goals, print_results
from benchmarks.results import Results, write_results
from benchmarks.throughput import OnTurn, Race
from clean_transformer.config import Config
from clean_transformer.parity.environment import environment
from clean_transformer.terminal import one_line_errors
from clean_transformer.weights.huggingface import write_folder
from clean_transformer.weights.synthetic import stress

TINY = Config(n_layers=2, n_heads=2, d_model=64, d_head=32, d_mlp=256)


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


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes, with less work.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, or all")] = "cpu",
    threads: Annotated[int, typer.Option(help="Of the CPU. 0 takes PyTorch's choice.")] = 0,
    hooked_python: Annotated[
        str | None, typer.Option(help="The Python of an environment with transformer_lens 3.9.0.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Measure. Exit status: 0 if every goal of the present devices holds, 1 otherwise."""
    console = Console()
    works = QUICK if quick else FULL
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        folders = {"small": Path(folder) / "small", "tiny": Path(folder) / "tiny"}
        for name, cfg in (("small", Config.gpt2("small")), ("tiny", TINY)):
            write_folder(folders[name], cfg, stress(cfg))
        planned = measurements(device, works)
        turns = sum(len(one.parts) * (one.rounds + 1) for one in planned)
        race = Race(folders, threads or torch.get_num_threads(), hooked_python)
        with bar(turns) as on_turn:
            results = Results(environment(), race.run(planned, on_turn))
    judged = [judge(goal, results) for goal in goals(device, works)]
    print_results(results, console)
    print_goals(judged, console)
    if json is not None:
        write_results(results, json)
    raise typer.Exit(0 if all(one.verdict == "HELD" for one in judged) else 1)


if __name__ == "__main__":
    typer.run(main)
