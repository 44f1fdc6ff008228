"""Engines outside of PyTorch."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.contestants import Contestant

EXPORTED: dict[str, Callable[[Path, str, str], Contestant]] = {}
