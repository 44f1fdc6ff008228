"""Ways to compute x W + b, and what comes right after it, of which a machine has a fastest."""

import math
from collections.abc import Callable
from functools import lru_cache
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from clean_transformer.inference.matmuls import (
    STREAMED,
    EachThreadItsInputs,
    InFloat32,
    OneDNN,
    Product,
    Weight,
    WithoutBias,
)


class Choice(NamedTuple):
    """The fastest product from so many rows on, and whether they want W transposed in memory."""

    by_rows: dict[int, Product]
    transposed: bool

    def __call__(self, n_rows: int) -> Product:
        """The product for that many rows."""
        return self.by_rows[max(known for known in self.by_rows if known <= n_rows)]


# Where the fastest changes: one row reads weights, many compute.
ROWS = (1, 8, 64, 512)


# How many times slower than the best a product may be at few rows to be tried at more. One that
# converts the weights first is slower by ten for a single row, and may be the fastest for many.
HOPELESS = 16.0


# Seconds for each of them at each number of rows. Who is within twice the best by then gets so many
# turns at the least: to win one of few is luck.
ENOUGH, FEWEST = 0.1, 3


# Transposing copies every weight, and has to be faster by so much.
WORTH_A_COPY = 1.02


class Contender(NamedTuple):
    """A product, and whether it gets its weights transposed in memory."""

    product: Product
    transposed: bool


Times = dict[Contender, float]


@lru_cache
def fastest_for_blocks(
    d_model: int, d_mlp: int, n_layers: int, dtype: torch.dtype, n_threads: int
) -> Choice:
    """Which products compute MLPs of that size fastest on this processor: measured, in seconds.

    They differ by the last bits, and near ties may fall differently in another process.
    """
    shapes = ((d_model, d_mlp), (d_mlp, d_model))
    enough = math.ceil(STREAMED / (2 * d_model * d_mlp * dtype.itemsize))
    layers = {
        transposed: [
            [_some_weight(*shape, dtype, transposed) for shape in shapes]
            for _ in range(min(n_layers, enough))
        ]
        for transposed in (False, True)
    }

    def run(contender: Contender, x: Tensor) -> int:
        product, all_layers = contender.product, layers[contender.transposed]
        used = all_layers if len(x) < 64 else all_layers[:1]
        for W_in, W_out in used:
            product.add(x, product.gelu(x, W_in), W_out)
        return len(used)

    times = race(entrants(dtype, *layers), run, d_model, dtype)
    gains = [least(times[n_rows], False) / least(times[n_rows], True) for n_rows in ROWS]
    return winners(times, transposed=math.prod(gains) ** (1 / len(ROWS)) > WORTH_A_COPY)


@lru_cache
def fastest_for_unembed(d_model: int, d_vocab: int, dtype: torch.dtype, n_threads: int) -> Choice:
    """The same for logits, through the transposed embedding."""
    weight = _some_weight(d_model, d_vocab, dtype, transposed=True)

    def run(contender: Contender, x: Tensor) -> int:
        contender.product(x, weight)
        return 1

    return winners(race(entrants(dtype, True), run, d_model, dtype), transposed=True)


@torch.no_grad()
def race(
    contenders: list[Contender],
    run: Callable[[Contender, Tensor], int],
    d_model: int,
    dtype: torch.dtype,
) -> dict[int, Times]:
    """By number of rows, the seconds that each takes who is not hopeless.

    `run` says how many times it went through the work.
    """
    by_rows = {}
    for n_rows in ROWS:
        x = torch.ones(n_rows, d_model, dtype=dtype)
        taken: dict[Contender, list[float]] = {
            each: [] for each in contenders if n_rows <= each.product.most_rows
        }
        while entered := in_the_race(taken):
            for each in entered:  # in turns, so that whatever else goes on meets them all
                start = perf_counter()
                n_times = run(each, x)
                taken[each].append(perf_counter() - start)
        times = {each: min(seconds) / n_times for each, seconds in taken.items()}
        by_rows[n_rows] = times
        contenders = [c for c in times if times[c] < HOPELESS * least(times, c.transposed)]
    return by_rows


def in_the_race(taken: dict[Contender, list[float]]) -> list[Contender]:
    """Who has another turn, by the seconds that each of its turns took."""
    best = min((min(seconds) for seconds in taken.values() if seconds), default=math.inf)
    return [
        each
        for each, seconds in taken.items()
        if sum(seconds) < ENOUGH or (len(seconds) < FEWEST and min(seconds) < 2 * best)
    ]


def least(times: Times, transposed: bool) -> float:
    """The seconds of the fastest in that order."""
    return min(seconds for each, seconds in times.items() if each.transposed == transposed)


def winners(by_rows: dict[int, Times], transposed: bool) -> Choice:
    """The fastest in that order."""
    fastest = {
        n_rows: min((c for c in times if c.transposed == transposed), key=times.__getitem__).product
        for n_rows, times in by_rows.items()
    }
    return Choice(fastest, transposed)


def entrants(dtype: torch.dtype, *orders: bool) -> list[Contender]:
    """Every candidate with its weights transposed or not, as named."""
    return [Contender(product, order) for order in orders for product in candidates(dtype)]


def candidates(dtype: torch.dtype) -> list[Product]:
    """What may be the fastest on this processor."""
    if dtype == torch.float64:
        return [Product()]
    onednn = [OneDNN()] if in_onednn(dtype) else []
    if dtype == torch.float32:
        each = EachThreadItsInputs(torch.get_num_threads())
        return [Product(), WithoutBias(), each, *onednn]
    return [Product(), WithoutBias(), InFloat32(), *onednn]


def in_onednn(dtype: torch.dtype) -> bool:
    """Whether this build and processor have oneDNN's kernels in float32, bfloat16 or float16."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    mkldnn = torch.ops.mkldnn
    return bool(
        dtype == torch.float32
        or (dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported())
        or (dtype == torch.float16 and mkldnn._is_mkldnn_fp16_supported())
    )


def _some_weight(d_in: int, d_out: int, dtype: torch.dtype, transposed: bool) -> Weight:
    shape = (d_out, d_in) if transposed else (d_in, d_out)
    W = torch.full(shape, 0.01, dtype=dtype)
    return Weight(W.T if transposed else W, torch.zeros(d_out, dtype=dtype))
