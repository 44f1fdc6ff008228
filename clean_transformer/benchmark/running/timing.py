"""Measures the time of calls, and summarizes repeated measurements."""

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Seconds. If one call takes less time than this, `median_seconds` times several calls together.
SHORT = 0.002


@dataclass(frozen=True)
class Spread:
    """The median of several values, and their quartiles `low` and `high`."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the median and the quartiles of `values`.

        If there are fewer than four values, `low` is the minimum, and `high` is the maximum.
        """
        if len(values) < 4:
            return cls(statistics.median(values), min(values), max(values))
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)


def synchronize(device: str) -> None:
    """Wait until the device has finished all work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


def seconds(call: Callable[[], object], device: str, times: int = 1) -> float:
    """Make `times` calls in a row, and return the mean seconds per call.

    The measured time ends when the device has finished all calls.
    """
    synchronize(device)
    began = time.perf_counter()
    for _ in range(times):
        result = call()
    synchronize(device)
    taken = time.perf_counter() - began
    del result  # only now, so that freeing its memory is not timed
    return taken / times


def import_seconds(module: str) -> float:
    """Return the seconds that a fresh Python process needs to start, import `module` and exit."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, capture_output=True)
    return time.perf_counter() - began


def median_seconds(call: Callable[[], object], device: str, at_least: float) -> float:
    """Repeat `call` until `at_least` seconds have passed, and return the median seconds per call.

    If `at_least` is 0, there is one call.
    """
    measured = [seconds(call, device)]
    # Short calls are timed several at a time: if each call were timed alone, the wait for the
    # device would distort the time.
    times = math.ceil(SHORT / measured[0])
    filled = measured[0]
    while filled < at_least:
        measured.append(seconds(call, device, times))
        filled += times * measured[-1]
    return statistics.median(measured)


def wait_until_idle(most: float = 1.0) -> None:
    """Wait until no thread of this process is busy, but at most `most` seconds."""
    # When OpenMP's threads have finished their work, they still use the processor for a while: they
    # wait for new work in a loop, and only later fall asleep.
    end = time.monotonic() + most
    while time.monotonic() < end:
        before = time.process_time()
        time.sleep(0.005)
        if time.process_time() - before < 0.001:
            return
