"""Start a process for each setup (see `work.Setup`), and exchange messages with it.

The messages are lines of JSON, which worker.py describes.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

# TransformerLens 4 has no HookedTransformer. So this contestant runs with the Python of another
# environment, in which TransformerLens 3 is installed.
HOOKED = "HookedTransformer"


class Failed(RuntimeError):
    """A contestant could not do its work.

    Reports print NOT MEASURED for this contestant, followed by the message of the error.
    """


class Worker:
    """A process that runs one contestant. Between requests, the process sleeps."""

    def __init__(self, command: list[str]):
        self.printed = tempfile.TemporaryFile()  # noqa: SIM115, `close` closes it
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.printed,
            env=os.environ | environment(),
            encoding="utf-8",
        )

    def send(self, request: Mapping[str, Any]) -> None:
        """Send a request without waiting for the answer."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # `receive` reports why the process ended
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def receive(self) -> Any:
        """Wait for the answer, and return the value in it.

        Raises `Failed` if the answer is an error, or if the process has ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.printed.seek(0)
            said = self.printed.read().decode(errors="replace").strip().splitlines()
            status = f"its process ended with status {self.process.returncode}"
            raise Failed(f"{status}: {said[-1]}" if said else status)
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["value"]

    def ask(self, do: str, **request: Any) -> Any:
        """Send a request, wait for the answer, and return the value in it (see `receive`)."""
        self.send({"do": do, **request})
        return self.receive()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.printed.close()


def command(contestant: str, hooked_python: str | None) -> list[str]:
    """The command that starts the contestant's process.

    Raises `Failed` for `HookedTransformer` if `hooked_python` is None.
    """
    python = sys.executable
    if contestant == HOOKED:
        if hooked_python is None:
            raise Failed("it needs --hooked-python; `make bench` sets up that environment")
        python = hooked_python
    return [python, "-m", "clean_transformer.benchmark.running.worker"]


def environment() -> dict[str, str]:
    """Environment variables for a worker. They let it import this package and use no network."""
    return {
        "PYTHONPATH": folder_of_the_package(),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@cache
def folder_of_the_package() -> str:
    """A temporary folder that contains only a link to this package. Python deletes it on exit.

    A worker finds this package through this folder. The folder that really contains the package may
    be `site-packages`. If PYTHONPATH named `site-packages`, a worker in another environment would
    import the wrong versions of other packages.
    """
    folder = tempfile.TemporaryDirectory(prefix="bench-")
    atexit.register(folder.cleanup)
    package = Path(__file__).resolve().parents[2]
    (Path(folder.name) / package.name).symlink_to(package, target_is_directory=True)
    return folder.name
