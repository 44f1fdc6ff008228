"""Starts processes that each run one contestant, and exchanges messages with them.

worker.py describes the messages, which are lines of JSON.
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

# TransformerLens 4 has no HookedTransformer. So the contestant "HookedTransformer" runs with the
# Python of another environment, in which TransformerLens 3 is installed.
HOOKED = "HookedTransformer"


class Failed(RuntimeError):
    """A contestant could not do its work.

    A report then says NOT MEASURED for the contestant, and the message of this error.
    """


class Worker:
    """Starts a process that runs one contestant, and sends requests to this process."""

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
        with suppress(BrokenPipeError):  # the process has ended; `receive` says why
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def receive(self) -> Any:
        """Wait for the answer to the last request, and return the value in the answer.

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
        """Send the request `do` with its arguments, and return the answer (see `receive`)."""
        self.send({"do": do, **request})
        return self.receive()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.printed.close()


def command(contestant: str, hooked_python: str | None) -> list[str]:
    """Return the command that starts a contestant's process.

    `hooked_python` is the Python of an environment that has TransformerLens 3. Raises `Failed` if
    the contestant is "HookedTransformer" and `hooked_python` is None.
    """
    python = sys.executable
    if contestant == HOOKED:
        if hooked_python is None:
            raise Failed("it needs --hooked-python; `make bench` sets up that environment")
        python = hooked_python
    return [python, "-m", "clean_transformer.benchmark.running.worker"]


def environment() -> dict[str, str]:
    """Return the environment variables for a `Worker`'s process.

    With these variables, the process can import this package, and does not use the network.
    """
    return {
        "PYTHONPATH": folder_of_the_package(),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@cache
def folder_of_the_package() -> str:
    """Return a temporary folder that contains only a link to this package.

    Python deletes the folder when this process ends.
    """
    # A worker's PYTHONPATH names this folder, so that the worker can import this package. The
    # package itself may be in `site-packages`. If PYTHONPATH named `site-packages`, a worker in
    # another environment would import the wrong versions of other packages.
    folder = tempfile.TemporaryDirectory(prefix="bench-")
    atexit.register(folder.cleanup)
    package = Path(__file__).resolve().parents[2]
    (Path(folder.name) / package.name).symlink_to(package, target_is_directory=True)
    return folder.name
