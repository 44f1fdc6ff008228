"""Seconds, and what many of them say."""

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SHORT = 0.002  # seconds


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements, and how far they lie apart."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median and quartiles; of fewer than four values, the least and the greatest."""
        if len(values) < 4:
            return cls(statistics.median(values), min(values), max(values))
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


def seconds(call: Callable[[], object], device: str, times: int = 1) -> float:
    """How long a call takes, of several in a row, until the device is done with all."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        result = call()
    synchronize(device)
    taken = time.perf_counter() - began
    del result  # freeing the last is no part of the call
    return taken / times


def import_seconds(package: str) -> float:
    """How long a fresh Python takes to start, import the package and end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {package}"], check=True, capture_output=True)
    return time.perf_counter() - began


def median_seconds(call: Callable[[], object], device: str, at_least: float) -> float:
    """The median of as many calls as it takes to fill `at_least` seconds, or of one.

    Short ones are timed several in a row, since waiting for a device takes as long as they do.
    """
    measured = [seconds(call, device)]
    times = math.ceil(SHORT / measured[0])
    filled = measured[0]
    while filled < at_least:
        measured.append(seconds(call, device, times))
        filled += times * measured[-1]
    return statistics.median(measured)


def wait_until_idle(most: float = 1.0) -> None:
    """Return once no thread of this process runs: those of OpenMP spin for a while after work."""
    end = time.monotonic() + most
    while time.monotonic() < end:
        before = time.process_time()
        time.sleep(0.005)
        if time.process_time() - before < 0.001:
            return
