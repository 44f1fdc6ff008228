"""The command that measures speed, with the benchmark of a clone of the repository."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from clean_transformer.terminal import one_line_errors

ROOT = Path(__file__).parents[1]


def bench(options: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Measure tokens per second beside other libraries and the machine's limit.

    Needs a clone of the repository, whose `python -m benchmarks` this is: --help tells its options.
    """
    with one_line_errors():
        if not (ROOT / "benchmarks" / "__main__.py").is_file():
            raise FileNotFoundError(
                "the benchmark is in the repository and not in the installed package; "
                "clone it and run `make bench` there"
            )
        paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-m", "benchmarks", *(options or [])]
        ran = subprocess.run(command, env=environment, check=False)
    raise typer.Exit(ran.returncode)
