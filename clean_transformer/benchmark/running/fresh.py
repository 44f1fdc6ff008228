"""Measuring the peak memory of a contestant, which needs a fresh process.

`python -m clean_transformer.benchmark.running.fresh CONTESTANT FOLDER DEVICE DTYPE` prints the
number of bytes.
"""

import re
import resource
import subprocess
import sys
from pathlib import Path

import torch

from clean_transformer.benchmark.contestants import CONTESTANTS


def peak_bytes(contestant: str, folder: Path, device: str, dtype: str) -> int:
    """The peak memory of loading the model and reading one token, above what libraries take.

    Raises `RuntimeError` with the process's last line if it fails.
    """
    script = "clean_transformer.benchmark.running.fresh"
    command = [sys.executable, "-m", script, contestant, str(folder), device, dtype]
    ran = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if ran.returncode:
        raise RuntimeError(f"its process failed: {ran.stderr.strip().splitlines()[-1]}")
    return int(ran.stdout.splitlines()[-1])


def in_use(device: str) -> int:
    """The bytes that are held now, by the GPU or by this process. Resets the GPU's peak."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return of_process("VmRSS")


def peak(device: str) -> int:
    """The most bytes held at once: by the GPU since `in_use`, or by this process so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return of_process("VmHWM")


def of_process(field: str) -> int:
    """A field of Linux's /proc/self/status, in bytes; on other systems always the peak."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [kilobytes] = re.findall(rf"{field}:\s+(\d+) kB", status)
    return int(kilobytes) * 1024


def main(contestant: str, folder: str, device: str, dtype: str) -> None:
    """Print the peak memory. A tiny model is used first, so that libraries are loaded already."""

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
