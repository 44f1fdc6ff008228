"""The parent's side: contestants in processes of their own, spoken to in lines of JSON."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


# Nobody is to look anything up in a network.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


# HookedTransformer needs an environment of its own, since it ended with TransformerLens 3.
HOOKED = "HookedTransformer"


class Failed(RuntimeError):
    """A contestant could not do what it was asked: it is not measured, and this says why."""


class Worker:
    """A process that runs one contestant, and waits on its pipe while it is not asked."""

    def __init__(self, command: list[str]):
        self.printed = tempfile.TemporaryFile()  # noqa: SIM115, closed with the worker
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.printed,
            env=os.environ | ENVIRONMENT,
            encoding="utf-8",
        )

    def send(self, request: Mapping[str, Any]) -> None:
        """Ask, and do not wait for the answer."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # `receive` tells what it died of
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def receive(self) -> Any:
        """The answer to what was sent. Raises `Failed` with the contestant's own error."""
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
        """Send and receive."""
        self.send({"do": do, **request})
        return self.receive()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.printed.close()


def command(contestant: str, hooked_python: str | None) -> list[str]:
    """How the contestant's process is started. Raises `Failed` without its environment."""
    python = sys.executable
    if contestant == HOOKED:
        if hooked_python is None:
            raise Failed("no other environment was given; `make bench` makes one")
        python = hooked_python
    return [python, "-m", "clean_transformer.benchmark.running.worker"]
