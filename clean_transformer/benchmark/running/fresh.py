"""What must be measured in a fresh process: the most memory at once.

python -m …running.fresh CONTESTANT FOLDER DEVICE DTYPE prints the bytes.
"""

import re
import resource
import subprocess
import sys
from pathlib import Path

import torch

from clean_transformer.benchmark.contestants import ALL


def peak_bytes(contestant: str, folder: Path, device: str, dtype: str) -> int:
    """The most memory at once, above what there was, to load the model and read one token."""
    script = "clean_transformer.benchmark.running.fresh"
    command = [sys.executable, "-m", script, contestant, str(folder), device, dtype]
    ran = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if ran.returncode:
        raise RuntimeError(f"its own process ended with: {ran.stderr.strip().splitlines()[-1]}")
    return int(ran.stdout.splitlines()[-1])


def in_use(device: str) -> int:
    """The bytes that the GPU, or the process, holds now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return of_process("VmRSS")


def most_so_far(device: str) -> int:
    """The most bytes at once: since `in_use` of the GPU, ever of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return of_process("VmHWM")


def of_process(field: str) -> int:
    """What Linux tells of the process; elsewhere the most so far, which on Linux is inherited."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [kilobytes] = re.findall(rf"{field}:\s+(\d+) kB", status)
    return int(kilobytes) * 1024


def main(contestant: str, folder: str, device: str, dtype: str) -> None:
    """Use a tiny model first, so that libraries are loaded and only the model itself counts."""

    def use(model: Path) -> None:
        made = ALL[contestant](model, device, dtype)
        with torch.inference_mode():
            made.last_logits(torch.zeros(1, 1, dtype=torch.long, device=device))

    use(Path(folder).with_name("tiny"))
    before = in_use(device)
    use(Path(folder))
    print(most_so_far(device) - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
