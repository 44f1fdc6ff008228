"""Measure the peak memory of a contestant, in a fresh process.

`python -m clean_transformer.benchmark.running.fresh CONTESTANT FOLDER DEVICE DTYPE` prints the
peak in bytes.
"""

import re
import resource
import subprocess
import sys
from pathlib import Path

import torch

from clean_transformer.benchmark.contestants import CONTESTANTS


def peak_bytes(contestant: str, folder: Path, device: str, dtype: str) -> int:
    """Peak memory, in bytes, of loading the model and reading one token in a fresh process.

    The memory of the libraries themselves is subtracted. If the process fails, raises
    `RuntimeError` with the last line of its standard error.
    """
    script = "clean_transformer.benchmark.running.fresh"
    command = [sys.executable, "-m", script, contestant, str(folder), device, dtype]
    ran = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if ran.returncode:
        raise RuntimeError(f"its process failed: {ran.stderr.strip().splitlines()[-1]}")
    return int(ran.stdout.splitlines()[-1])


def in_use(device: str) -> int:
    """The bytes in use now, on the GPU or else in this process. On a GPU, also resets its peak."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return of_process("VmRSS")


def peak(device: str) -> int:
    """The most bytes in use at once: on the GPU since `in_use`, or in this process so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return of_process("VmHWM")


def of_process(field: str) -> int:
    """A memory field of Linux's /proc/self/status, in bytes; on other systems the peak memory."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [kilobytes] = re.findall(rf"{field}:\s+(\d+) kB", status)
    return int(kilobytes) * 1024


def main(contestant: str, folder: str, device: str, dtype: str) -> None:
    """Print the peak in bytes. A tiny model runs first, so that all libraries are loaded."""

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
