"""Ways to compute x W + b, and what comes right after it, of which a machine has a fastest."""

import math
from collections.abc import Callable
from functools import lru_cache
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from jaxtyping import Int8 as Int8Tensor
from torch import Tensor

Rows = Float[Tensor, "row d_in"]
Output = Float[Tensor, "row d_out"]


class Weight(NamedTuple):
    """W [d_in d_out], in either order in memory, and b [d_out]."""

    W: Float[Tensor, "d_in d_out"]
    b: Float[Tensor, "d_out"]


class Product:
    """x W + b in one call of the BLAS: what PyTorch does by itself."""

    most_rows = math.inf  # with more, it cannot be the fastest

    def prepare(self, W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"]) -> Any:
        """What it reads the weights from: for most, the very same memory."""
        return Weight(W, b)

    def __call__(self, x: Rows, weight: Any) -> Output:
        """x W + b."""
        return torch.addmm(weight.b, x, weight.W)

    def gelu(self, x: Rows, weight: Any) -> Output:
        """gelu(x W + b), in GPT-2's tanh form."""
        return F.gelu(self(x, weight), approximate="tanh")

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """residual + x W + b, in new memory."""
        return (residual + weight.b).addmm_(x, weight.W)


class WithoutBias(Product):
    """The bias by itself: in some BLAS a product of one row is faster when it adds to nothing."""

    def __call__(self, x: Rows, weight: Any) -> Output:
        """x W, then + b."""
        return (x @ weight.W).add_(weight.b)

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """x W, then + b, then + residual."""
        return self(x, weight).add_(residual)


class EachThreadItsInputs(WithoutBias):
    """As many products as threads, each of a part of the inputs: some BLAS reads the weights of a
    single row with one thread only."""

    most_rows = 8

    def __init__(self, n_threads: int):
        self.n_threads = n_threads

    def __call__(self, x: Rows, weight: Any) -> Output:
        """The sum over parts of the inputs of x W, then + b."""
        d_in, d_out = weight.W.shape
        if d_in % self.n_threads:
            return super().__call__(x, weight)
        parts = (self.n_threads, d_in // self.n_threads)
        x = x.view(len(x), *parts).transpose(0, 1)
        return torch.bmm(x, weight.W.view(*parts, d_out)).sum(dim=0).add_(weight.b)


class OneDNN(Product):
    """oneDNN's kernels, which take the GELU and the residual into the product. No gradients.

    Not in every build of PyTorch, and not in a graph of `torch.compile`, which gets the BLAS's.
    """

    def __init__(self) -> None:
        self.linear = torch.ops.mkldnn._linear_pointwise

    def __call__(self, x: Rows, weight: Any) -> Output:
        """x W + b."""
        if torch.compiler.is_compiling():
            return super().__call__(x, weight)
        return self.linear.default(x, weight.W.T, weight.b, "none", [], "")

    def gelu(self, x: Rows, weight: Any) -> Output:
        """gelu(x W + b), in one kernel."""
        if torch.compiler.is_compiling():
            return super().gelu(x, weight)
        return self.linear.default(x, weight.W.T, weight.b, "gelu", [], "tanh")

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """residual + x W + b, in one kernel."""
        if torch.compiler.is_compiling():
            return super().add(residual, x, weight)
        return self.linear.binary(x, residual, weight.W.T, weight.b, "add")


class InFloat32(Product):
    """Half precision through float32: far faster where the processor has no instructions for it,
    and rounded once, at the end.

    So many outputs at a time that what is in float32 fits into memory that the process has already:
    to be given new memory takes as long as to fill it.
    """

    def __init__(self, at_a_time: int = 4096):
        self.at_a_time = at_a_time

    def __call__(self, x: Rows, weight: Any) -> Output:
        """x W + b in float32, then rounded."""
        output, x = x.new_empty(len(x), len(weight.b)), x.float()
        parts = (output.T, weight.W.T, weight.b)
        for rounded, W, b in zip(*(each.split(self.at_a_time) for each in parts), strict=True):
            rounded.T.copy_(torch.addmm(b.float(), x, W.T.float()))
        return output

    def add(self, residual: Output, x: Rows, weight: Any) -> Output:
        """residual + x W + b, each sum rounded."""
        return residual + self(x, weight)


class Int8Weight(NamedTuple):
    """W in 8 bits, transposed in memory, the size of a step of each output, and b."""

    W: Int8Tensor[Tensor, "d_in d_out"]
    step: Float[Tensor, "d_out"]
    b: Float[Tensor, "d_out"]


class Int8(Product):
    """Weights and rows in 8 bits, each output and each row with a step of its own, summed exactly
    in 32 bits (Dettmers et al. 2022, section 2.1): a quarter of float32's memory to read."""

    def prepare(self, W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"]) -> Int8Weight:
        """A copy of the weights in 8 bits. Raises `ValueError` for weights of a single input."""
        if len(W) == 1:  # of which torch._int_mm makes something else (seen in PyTorch 2.13)
            raise ValueError("weights of a single input cannot be in 8 bits")
        whole, step = in_8_bits(W.detach().T.float().contiguous())
        return Int8Weight(whole.T, step.flatten(), b.float())

    def __call__(self, x: Rows, weight: Int8Weight) -> Output:
        """x W + b, each factor rounded to 127 steps on both sides of zero."""
        whole, step = in_8_bits(x.float())  # float16 cannot hold the sums
        sums = torch._int_mm(whole, weight.W)
        return torch.addcmul(weight.b, sums * step, weight.step).to(x.dtype)

    def add(self, residual: Output, x: Rows, weight: Int8Weight) -> Output:
        """residual + x W + b."""
        return self(x, weight).add_(residual)


def in_8_bits(
    x: Float[Tensor, "row column"],
) -> tuple[Int8Tensor[Tensor, "row column"], Float[Tensor, "row 1"]]:
    """Each row in whole steps of a 127th of its largest entry, and those steps."""
    step = x.abs().amax(dim=1, keepdim=True) / 127
    smallest = torch.finfo(x.dtype).tiny  # a row of zeros has steps, too
    return (x / step.clamp(min=smallest)).round_().to(torch.int8), step


class Choice(NamedTuple):
    """The fastest product from so many rows on, and whether they want W transposed in memory."""

    by_rows: dict[int, Product]
    transposed: bool

    def __call__(self, n_rows: int) -> Product:
        """The product for that many rows."""
        return self.by_rows[max(known for known in self.by_rows if known <= n_rows)]


# Where the fastest changes: one row reads weights, many compute.
ROWS = (1, 8, 64, 512)
# What is read between two uses of the same weights, so that no cache holds them, in bytes.
STREAMED = 128 * 2**20
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
