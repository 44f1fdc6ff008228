"""Measures which kernel of `matmuls` is the fastest on this processor."""

import math
from collections.abc import Callable
from functools import lru_cache
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from clean_transformer.inference.matmuls import (
    Matmul,
    OneDNN,
    SeparateBias,
    SplitInputs,
    ThroughFloat32,
    Weight,
)

# Kernels are measured at these numbers of rows. The speed at one row depends on how fast the
# weights are read, and the speed at many rows on how fast the processor computes.
ROWS = (1, 8, 64, 512)


# From this number of rows on, computing takes longer than reading the weights. The weights of one
# layer are then enough to measure with.
COMPUTE_BOUND_ROWS = 64


# A kernel more than 16 times slower than the best at one number of rows is not tried at larger
# numbers. A kernel that first converts the weights is 10 times slower for one row, and can still be
# the fastest for many rows.
TOO_SLOW = 16.0


# Each kernel is timed for at least 0.1 seconds at each number of rows. Every kernel within 2 × the
# best is timed at least 3 times; a single win could be noise.
SECONDS_EACH, FEWEST_RUNS = 0.1, 3


# Column-major weights require a copy of every weight, so they must be at least 2% faster.
WORTH_A_COPY = 1.02


# Between two uses of a weight, the measurement reads this many bytes of other weights, or all other
# layers. The weight is then no longer in the processor's cache. This is also so in a real model,
# between two tokens.
BEYOND_CACHES = 128 * 2**20


class Choice(NamedTuple):
    """The fastest kernel for each number of rows.

    `by_rows` maps each measured number of rows to its fastest kernel. `transposed` says whether
    these kernels need W column-major in memory.
    """

    by_rows: dict[int, Matmul]
    transposed: bool

    def __call__(self, n_rows: int) -> Matmul:
        """Return the kernel that was fastest at the largest measured number of rows ≤ `n_rows`."""
        return self.by_rows[max(known for known in self.by_rows if known <= n_rows)]


class Candidate(NamedTuple):
    """A kernel to measure, and whether its weights are column-major ("transposed") in memory."""

    kernel: Matmul
    transposed: bool


Seconds = dict[Candidate, float]


@lru_cache
def fastest_for_blocks(
    d_model: int, d_mlp: int, n_layers: int, dtype: torch.dtype, n_threads: int
) -> Choice:
    """Return the fastest kernels for blocks of these sizes. Measuring takes a few seconds.

    The kernels differ in the last bits of their results. If two kernels are about equally fast,
    another process may choose the other one. `n_threads` is PyTorch's current number of threads; it
    is an argument so that results are cached for each number of threads.
    """
    shapes = ((d_model, d_mlp), (d_mlp, d_model))
    enough = math.ceil(BEYOND_CACHES / (2 * d_model * d_mlp * dtype.itemsize))
    layers = {
        transposed: [
            [example_weight(*shape, dtype, transposed) for shape in shapes]
            for _ in range(min(n_layers, enough))
        ]
        for transposed in (False, True)
    }

    def run(candidate: Candidate, x: Tensor) -> int:
        kernel, all_layers = candidate.kernel, layers[candidate.transposed]
        used = all_layers if len(x) < COMPUTE_BOUND_ROWS else all_layers[:1]
        for W_in, W_out in used:
            kernel.add(x, kernel.gelu(x, W_in), W_out)
        return len(used)

    candidates = [Candidate(kernel, order) for order in layers for kernel in kernels(dtype)]
    measured = measure(candidates, run, d_model, dtype)
    gains = [
        fastest_seconds(seconds, False) / fastest_seconds(seconds, True)
        for seconds in measured.values()
    ]
    return fastest(measured, transposed=math.prod(gains) ** (1 / len(gains)) > WORTH_A_COPY)


@lru_cache
def fastest_for_unembed(d_model: int, d_vocab: int, dtype: torch.dtype, n_threads: int) -> Choice:
    """Return the fastest kernels for logits. They read W_U = W_E.T in its present memory order."""
    weight = example_weight(d_model, d_vocab, dtype, transposed=True)

    def run(candidate: Candidate, x: Tensor) -> int:
        candidate.kernel(x, weight)
        return 1

    candidates = [Candidate(kernel, True) for kernel in kernels(dtype)]
    return fastest(measure(candidates, run, d_model, dtype), transposed=True)


@torch.no_grad()
def measure(
    candidates: list[Candidate],
    run: Callable[[Candidate, Tensor], int],
    d_model: int,
    dtype: torch.dtype,
) -> dict[int, Seconds]:
    """Return the shortest time of each candidate, in seconds, for each number of rows.

    `run(candidate, x)` runs the kernel and returns how many times it did so. Candidates that are
    too slow (see `TOO_SLOW`) are not measured at larger numbers of rows.
    """
    by_rows = {}
    for n_rows in ROWS:
        x = torch.ones(n_rows, d_model, dtype=dtype)
        runs: dict[Candidate, list[float]] = {
            each: [] for each in candidates if n_rows <= each.kernel.most_rows
        }
        while unfinished := need_another_run(runs):
            # Candidates take turns, so that other load on the machine slows all of them down.
            for each in unfinished:
                start = perf_counter()
                n_times = run(each, x)
                runs[each].append(perf_counter() - start)
        seconds = {each: min(taken) / n_times for each, taken in runs.items()}
        by_rows[n_rows] = seconds
        candidates = [
            each
            for each in seconds
            if seconds[each] < TOO_SLOW * fastest_seconds(seconds, each.transposed)
        ]
    return by_rows


def need_another_run(runs: dict[Candidate, list[float]]) -> list[Candidate]:
    """Return the candidates to time again.

    `runs` holds the seconds of each of their runs so far.
    """
    best = min((min(taken) for taken in runs.values() if taken), default=math.inf)
    return [
        each
        for each, taken in runs.items()
        if sum(taken) < SECONDS_EACH or (len(taken) < FEWEST_RUNS and min(taken) < 2 * best)
    ]


def fastest_seconds(seconds: Seconds, transposed: bool) -> float:
    """Return the time of the fastest candidate that has this memory order of the weights."""
    return min(taken for each, taken in seconds.items() if each.transposed == transposed)


def fastest(by_rows: dict[int, Seconds], transposed: bool) -> Choice:
    """Return the fastest kernel for each number of rows, among those with this memory order."""
    winners = {
        n_rows: min((c for c in seconds if c.transposed == transposed), key=seconds.__getitem__)
        for n_rows, seconds in by_rows.items()
    }
    return Choice({n_rows: winner.kernel for n_rows, winner in winners.items()}, transposed)


def kernels(dtype: torch.dtype) -> list[Matmul]:
    """Return the kernels for this dtype that may be the fastest on this processor."""
    if dtype == torch.float64:
        return [Matmul()]
    onednn = [OneDNN()] if has_onednn(dtype) else []
    if dtype == torch.float32:
        return [Matmul(), SeparateBias(), SplitInputs(torch.get_num_threads()), *onednn]
    return [Matmul(), SeparateBias(), ThroughFloat32(), *onednn]


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN's kernels support this dtype, in this build and on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    mkldnn = torch.ops.mkldnn
    return bool(
        dtype == torch.float32
        or (dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())
        or (dtype == torch.float16 and mkldnn._is_mkldnn_fp16_supported())
    )


def example_weight(d_in: int, d_out: int, dtype: torch.dtype, transposed: bool) -> Weight:
    """Return a weight of these sizes, filled with constants, to measure kernels with."""
    shape = (d_out, d_in) if transposed else (d_in, d_out)
    W = torch.full(shape, 0.01, dtype=dtype)
    return Weight(W.T if transposed else W, torch.zeros(d_out, dtype=dtype))
