"""Measures how long the command line and the package take to start.

The script runs each command in a fresh process. It prints the CPU time of the command in seconds,
and this time divided by the CPU time of `import torch`. The script does not measure wall-clock
time, because other programs on the machine change wall-clock time more than CPU time.

    python -m benchmarks.startup --rounds 5
"""

import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

SCRIPT = str(Path(sys.executable).with_name("clean-transformer"))
COMMANDS = {
    "python, nothing imported": (sys.executable, "-c", "pass"),
    "import torch": (sys.executable, "-c", "import torch"),
    "import clean_transformer": (sys.executable, "-c", "import clean_transformer"),
    "from clean_transformer import DemoTransformer": (
        *(sys.executable, "-c"),
        "from clean_transformer import DemoTransformer",
    ),
    "clean-transformer --help": (SCRIPT, "--help"),
    "clean-transformer generate --help": (SCRIPT, "generate", "--help"),
}
UNIT = "import torch"


def cpu_seconds(command: Sequence[str]) -> float:
    """Run `command`, and return the CPU time (user plus system) of all its processes in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main(
    rounds: Annotated[int, typer.Option(help="How often each command runs.")] = 5,
) -> None:
    """Print the median CPU seconds of each command, and the ratio to `import torch`."""
    # Each command runs once before it is measured, so that its files are in the operating system's
    # cache.
    for command in COMMANDS.values():
        cpu_seconds(command)
    taken = {name: list[float]() for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            taken[name].append(cpu_seconds(command))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    table = Table("command", "CPU seconds", f"ratio to {UNIT}", box=None)
    for name, seconds in medians.items():
        table.add_row(name, f"{seconds:.2f}", f"{seconds / medians[UNIT]:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
