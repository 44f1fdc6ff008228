"""Measures which kernel of `matmuls` is the fastest on this processor."""

import math
from collections.abc import Callable
from dataclasses import dataclass
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

# Each kernel is measured at each of these numbers of rows of the input x [row d_in]. A row is one
# token. With one row, the speed depends on how fast the processor reads the weights from memory.
# With many rows, the speed depends on how fast the processor computes.
ROWS = (1, 8, 64, 512)


# With this number of rows or more, computing takes longer than reading the weights from memory. The
# measurement then uses only one layer. The weights of this layer may stay in the processor's cache
# between two runs, but this does not make the kernels faster.
COMPUTE_BOUND_ROWS = 64


# If a kernel is 16 times slower than the best kernel at one number of rows, it is not measured at
# larger numbers of rows. The limit must be above 10: a kernel that first converts the weights is 10
# times slower at one row, and can still be the fastest at many rows.
TOO_SLOW = 16.0


# At each number of rows, each kernel runs until its runs have taken 0.1 seconds in total. A kernel
# that takes less than 2 × the best time runs at least 3 times, because the fastest of only one or
# two runs could be noise.
SECONDS_EACH, FEWEST_RUNS = 0.1, 3


# The weights become column-major in memory only if this makes the kernels at least 2% faster,
# because every weight has to be copied into the new memory order.
WORTH_A_COPY = 1.02


# The measurement uses so many layers that their weights take at least this many bytes, but at most
# as many layers as the model has. A run reads the weights of all these layers one after another.
# When the next run reads a weight again, the weight is no longer in the processor's cache. The same
# is true for a model that generates one token after another.
BEYOND_CACHES = 128 * 2**20


# Not a named tuple: the Dynamo of torch 2.8 and older cannot call one.
@dataclass(frozen=True)
class Choice:
    """The fastest kernel for each number of input rows.

    `by_rows` maps each measured number of rows (see `ROWS`) to the fastest kernel. `transposed` is
    True if the kernels were measured with W column-major in memory, and False if W was row-major.
    """

    by_rows: dict[int, Matmul]
    transposed: bool

    def __call__(self, n_rows: int) -> Matmul:
        """Return the kernel that was fastest at the largest measured number of rows ≤ `n_rows`."""
        return self.by_rows[max(known for known in self.by_rows if known <= n_rows)]


class Candidate(NamedTuple):
    """A kernel to measure. If `transposed`, its weights are column-major, otherwise row-major."""

    kernel: Matmul
    transposed: bool


Seconds = dict[Candidate, float]


# `n_threads` is an argument so that `lru_cache` stores one choice for each number of threads.
@lru_cache
def fastest_for_blocks(
    d_model: int, d_mlp: int, n_layers: int, dtype: torch.dtype, n_threads: int
) -> Choice:
    """Return the fastest kernels for the blocks of a model. Measuring takes a few seconds.

    `n_threads` must be PyTorch's current number of threads. If two kernels are about equally fast,
    two processes may choose different kernels, whose results differ in the last bits.
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
    """Return the fastest kernels for the product with W_U, which gives the logits.

    The kernels are measured with W_U column-major in memory, as in a tied unembedding, whose W_U is
    W_E.T. `n_threads` must be PyTorch's current number of threads.
    """
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
    """Return, for each number of rows, the shortest time of each candidate, in seconds per layer.

    `run(candidate, x)` runs the candidate's kernel on one or several layers, and returns the number
    of these layers. A candidate that is much slower than the fastest (see `TOO_SLOW`) is not
    measured at larger numbers of rows.
    """
    by_rows = {}
    for n_rows in ROWS:
        x = torch.ones(n_rows, d_model, dtype=dtype)
        runs: dict[Candidate, list[float]] = {
            each: [] for each in candidates if n_rows <= each.kernel.most_rows
        }
        while unfinished := need_another_run(runs):
            # The candidates run in turn, so that a short load from other programs does not slow
            # down only one candidate.
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
    """Return the candidates whose times are not reliable yet, so that they must run again.

    `runs` maps each candidate to the times of its runs so far, in seconds.
    """
    best = min((min(taken) for taken in runs.values() if taken), default=math.inf)
    return [
        each
        for each, taken in runs.items()
        if sum(taken) < SECONDS_EACH or (len(taken) < FEWEST_RUNS and min(taken) < 2 * best)
    ]


def fastest_seconds(seconds: Seconds, transposed: bool) -> float:
    """Return the shortest time of all candidates that have the given value of `transposed`."""
    return min(taken for each, taken in seconds.items() if each.transposed == transposed)


def fastest(by_rows: dict[int, Seconds], transposed: bool) -> Choice:
    """Return the fastest kernel for each number of rows.

    Only candidates with the given value of `transposed` are compared. `by_rows` has the time
    of each candidate for each number of rows.
    """
    winners = {
        n_rows: min((c for c in seconds if c.transposed == transposed), key=seconds.__getitem__)
        for n_rows, seconds in by_rows.items()
    }
    return Choice({n_rows: winner.kernel for n_rows, winner in winners.items()}, transposed)


def kernels(dtype: torch.dtype) -> list[Matmul]:
    """Return the kernels to measure on this processor for weights with this dtype."""
    if dtype == torch.float64:
        return [Matmul()]
    onednn = [OneDNN()] if has_onednn(dtype) else []
    if dtype == torch.float32:
        return [Matmul(), SeparateBias(), SplitInputs(torch.get_num_threads()), *onednn]
    return [Matmul(), SeparateBias(), ThroughFloat32(), *onednn]


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has oneDNN, and oneDNN supports this dtype on this processor."""
    mkldnn = torch.ops.mkldnn
    # `_linear_pointwise` is private, so a build of PyTorch may lack it.
    if not (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(mkldnn, "_linear_pointwise")
    ):
        return False
    return bool(
        dtype == torch.float32
        or (dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())
        or (dtype == torch.float16 and mkldnn._is_mkldnn_fp16_supported())
    )


def example_weight(d_in: int, d_out: int, dtype: torch.dtype, transposed: bool) -> Weight:
    """Return a weight W [d_in d_out] with a bias, filled with constants, for measurements.

    W is column-major in memory if `transposed`, and row-major otherwise.
    """
    shape = (d_out, d_in) if transposed else (d_in, d_out)
    W = torch.full(shape, 0.01, dtype=dtype)
    return Weight(W.T if transposed else W, torch.zeros(d_out, dtype=dtype))
