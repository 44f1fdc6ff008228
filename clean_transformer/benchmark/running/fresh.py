"""Measures the peak memory of a contestant, in a fresh process.

`python -m clean_transformer.benchmark.running.fresh CONTESTANT FOLDER DEVICE DTYPE` prints the
contestant's peak memory in bytes, without the memory that the process uses before it loads the
contestant's model from FOLDER.
"""

import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from clean_transformer.benchmark.contestants import CONTESTANTS


def peak_bytes(contestant: str, folder: Path, device: str, dtype: str) -> int:
    """Start a fresh process, and return the contestant's peak memory there, in bytes.

    The process loads the model from `folder` and runs it on one token. The result does not contain
    the memory that the process uses before it loads the model, such as the memory of the libraries.
    Raises `RuntimeError` if the process fails. The error contains the last line that the process
    wrote to standard error, or else its exit status.
    """
    script = "clean_transformer.benchmark.running.fresh"
    command = [sys.executable, "-m", script, contestant, str(folder), device, dtype]
    ran = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
        raise RuntimeError(f"its process failed: {lines[-1]}")
    return int(ran.stdout.splitlines()[-1])


class Costs(NamedTuple):
    """What a command needed: `seconds`, `cpu_seconds` (user plus system), and `peak` in bytes.

    `peak` is the peak memory of the largest process. `status` is the exit status.
    """

    status: int
    seconds: float
    cpu_seconds: float
    peak: float


# A fresh process runs this code for each command, because `ru_maxrss` is the maximum over all
# earlier child processes, too.
MEASURE = """
import resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
wall = time.perf_counter() - start
print(done.returncode, wall, used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def costs(command: Sequence[str]) -> Costs:
    """Run a command in an empty folder, and return what it needed. `peak` needs Linux."""
    with tempfile.TemporaryDirectory() as folder:
        ran = subprocess.run(
            [sys.executable, "-c", MEASURE, *command],
            check=True,
            capture_output=True,
            encoding="utf-8",
            cwd=folder,
        )
    status, wall, cpu, kilobytes = ran.stdout.split()
    return Costs(int(status), float(wall), float(cpu), 1024 * float(kilobytes))


def in_use(device: str) -> int:
    """Return how many bytes of memory this process uses now.

    On CUDA, the result is the GPU memory that PyTorch's tensors occupy. In addition, this function
    starts a new measurement of the peak on the GPU (see `peak`). On other devices, the result
    is the main memory that this process uses.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return of_process("VmRSS")


def peak(device: str) -> int:
    """Return the peak memory in bytes.

    On CUDA, the result is the peak of the GPU memory since the last call of `in_use`. On other
    devices, the result is the peak of the main memory since the start of this process.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return of_process("VmHWM")


def of_process(field: str) -> int:
    """Return the value of a memory field of Linux's /proc/self/status, in bytes.

    Other systems do not have this file. On these systems, the result is the peak memory of this
    process, whatever `field` is.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [kilobytes] = re.findall(rf"{field}:\s+(\d+) kB", status)
    return int(kilobytes) * 1024


def main(contestant: str, folder: str, device: str, dtype: str) -> None:
    """Print the peak memory in bytes, without the memory in use before the model is loaded.

    The contestant first runs a tiny model, so that all libraries are loaded before the measurement.
    """

    def use(model: Path) -> None:
        made = CONTESTANTS[contestant](model, device, dtype)
        with torch.inference_mode():
            made.last_logits(torch.zeros(1, 1, dtype=torch.long, device=device))

    use(Path(folder).with_name("tiny"))
    before = in_use(device)
    use(Path(folder))
    print(peak(device) - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
