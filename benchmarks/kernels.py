"""Measures the kernels of `optimize`: why each of them is used for its dtype and number of rows.

The first table has the time of the four matrix products of a block of GPT-2 small, with the
GELU and the residual adds, for each kernel. The second table says how fast kernels for 8-bit
weights read a weight [768 3072] for a single row, in GB of weights per second. PyTorch's own
kernels for 8 bits have one scale for each output feature, and `Int8` has one for 16 inputs.

The kernels run in turn, and each time is the shortest of several rounds. With one thread, the
script measures CPU time, so other programs on the machine change the times little. With several
threads, it measures elapsed time.

    python -m benchmarks.kernels --threads 2
"""

import time
from collections.abc import Callable, Mapping
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clean_transformer.inference.huge_pages import use_huge_pages
from clean_transformer.inference.int8 import Int8
from clean_transformer.inference.matmuls import (
    Matmul,
    OneDNN,
    OneDNNGelu,
    ThroughFloat32,
    has_instructions,
    has_onednn,
    kernel_for,
)

D_MODEL, D_MLP = 768, 3072
ROWS = (1, 8, 64, 256, 1024)
HALF = (torch.bfloat16, torch.float16)


def block(kernel: Matmul, dtype: torch.dtype, n_rows: int) -> Callable[[], Tensor]:
    """Return a function that computes the four products of a block for `n_rows` rows."""
    shapes = [(D_MODEL, 3 * D_MODEL), (D_MODEL, D_MODEL), (D_MODEL, D_MLP), (D_MLP, D_MODEL)]
    weights = []
    for shape in shapes:
        W = (torch.randn(shape) / shape[0] ** 0.5).to(dtype)
        W = W.T.contiguous().T if kernel.column_major else W
        weights.append(kernel.prepare(W, torch.zeros(shape[1], dtype=dtype)))
    qkv, out, mlp_in, mlp_out = weights
    residual = torch.randn(n_rows, D_MODEL).to(dtype)

    def run() -> Tensor:
        z = kernel(residual, qkv)[:, :D_MODEL].contiguous()
        after_attention = kernel.add(residual, z, out)
        return kernel.add(after_attention, kernel.gelu(after_attention, mlp_in), mlp_out)

    return run


def readers() -> dict[str, Callable[[], Tensor]]:
    """Return functions by name that multiply one row by a weight [768 3072]."""
    x, W, b = torch.randn(1, D_MODEL), torch.randn(D_MODEL, D_MLP), torch.zeros(D_MLP)
    int8 = Int8()
    copy = int8.prepare(W, b)
    whole = torch.randint(-127, 128, (D_MLP, D_MODEL), dtype=torch.int8)
    scales, row = torch.ones(D_MLP), whole[:1]

    def packed(dtype: torch.dtype) -> Callable[[], Tensor]:
        given, steps = x.to(dtype), scales.to(dtype)
        return lambda: torch._weight_int8pack_mm(given, whole, steps)

    moved = W.clone()
    use_huge_pages(moved)
    return {
        "torch.addmm, float32": lambda: torch.addmm(b, x, W),
        "torch.addmm, float32, in huge pages": lambda: torch.addmm(b, x, moved),
        "Int8": lambda: int8(x, copy),
        "torch._int_mm": lambda: torch._int_mm(row, whole.T),
        "torch._weight_int8pack_mm, float32": packed(torch.float32),
        "torch._weight_int8pack_mm, bfloat16": packed(torch.bfloat16),
    }


def shortest(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the shortest time of each function, in seconds. In a round, each runs once.

    With one thread, this is CPU time, and with several threads elapsed time.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in runs.values():
        run()
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            began = clock()
            run()
            seconds[name] = min(seconds[name], clock() - began)
    return seconds


@torch.inference_mode()
def main(
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 1,
) -> None:
    """Print the time of each kernel, by dtype and number of rows."""
    torch.set_num_threads(threads)
    console = Console(width=100)
    names = ("Matmul", "OneDNN", "OneDNNGelu", "ThroughFloat32")
    times = Table("dtype", "rows", *(f"{name} (ms)" for name in names), "used", box=None)
    missing = [dtype for dtype in HALF if not has_instructions(dtype)]
    for dtype in (torch.float32, *HALF):
        candidates: list[Matmul] = [Matmul()]
        if has_onednn() and dtype not in missing:
            candidates += [OneDNN(), OneDNNGelu()]
        if dtype in HALF:
            candidates.append(ThroughFloat32())
        used = type(kernel_for(dtype, torch.device("cpu"))).__name__
        for n_rows in ROWS:
            runs = {type(each).__name__: block(each, dtype, n_rows) for each in candidates}
            found = shortest(runs, max(3, rounds * 64 // max(n_rows, 64)))
            cells = (f"{1000 * found[name]:.2f}" if name in found else "" for name in names)
            times.add_row(str(dtype).removeprefix("torch."), str(n_rows), *cells, used)
    console.print(times)
    for dtype in missing:
        console.print(f"this processor has no instructions for {dtype}")
    rates = Table("a weight [768 3072] for one row", "GB/s", box=None)
    for name, seconds in shortest(readers(), 20 * rounds).items():
        itemsize = 4 if name.startswith("torch.addmm") else 1
        rates.add_row(name, f"{D_MODEL * D_MLP * itemsize / seconds / 1e9:.1f}")
    console.print(rates)


if __name__ == "__main__":
    typer.run(main)
