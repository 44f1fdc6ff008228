import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .hub_server import HubServer, serving

ROOT = Path(__file__).parents[1]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    """A hub on this machine, whose repositories are the folders that a test puts in `repos`."""
    with serving(tmp_path / "repos") as server:
        yield server


@pytest.fixture
def with_hub(hub: HubServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code in a process of its own that has `hub` for its hub and an empty cache.

    `huggingface_hub` reads its environment variables when it is imported, so that only a new
    process shows what they do; and this one's standard error is what a user would see.
    """

    def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        outside = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ours = {
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(tmp_path / "cache"),
            "HF_ENDPOINT": hub.url,
            "NO_PROXY": "127.0.0.1",
        }
        return subprocess.run(
            [sys.executable, "-c", code],
            env=outside | ours | variables,
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
            check=False,
        )

    return run
