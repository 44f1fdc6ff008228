"""The limit: the shortest time in which this machine could do the work.

The limit is a contestant, so that it is measured in the same rounds as the other contestants. It
times matrix products of the model's shapes, and measures how fast the machine reads memory.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clean_transformer.benchmark.contestants.base import DTYPES, Contestant
from clean_transformer.benchmark.running.timing import import_seconds, median_seconds, seconds
from clean_transformer.benchmark.work import Work
from clean_transformer.config import Config
from clean_transformer.weights.formats.huggingface import config_from_json, read_json

BUFFER = 2**29  # bytes; a processor's cache is far smaller, so the data comes from memory

# If the first call of a kernel takes longer than this, and also longer than 3 × the time of the
# best kernel so far, the kernel is not called again.
HOPELESS = 0.3  # seconds

# Multiplies x [rows inputs] by a fixed weight.
Product = Callable[[Tensor], Tensor]

# Takes a weight [inputs outputs] and the number of rows of x, and returns a `Product` function that
# multiplies such an x by this weight.
Way = Callable[[Tensor, int], Product]


class Shape(NamedTuple):
    """The sizes of one matrix product: [rows inputs] × [inputs outputs]."""

    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        """The number of multiplications and additions."""
        return 2 * self.rows * self.inputs * self.outputs


def products(cfg: Config, rows: int, logit_rows: int) -> dict[Shape, int]:
    """Count the matrix products with a weight in a forward pass over `rows` tokens, by shape.

    `logit_rows` is the number of positions whose logits are computed.
    """
    width = cfg.n_heads * cfg.d_head
    block = (
        Shape(rows, cfg.d_model, 3 * width),
        Shape(rows, width, cfg.d_model),
        Shape(rows, cfg.d_model, cfg.d_mlp),
        Shape(rows, cfg.d_mlp, cfg.d_model),
    )
    return Counter([*cfg.n_layers * block, Shape(logit_rows, cfg.d_model, cfg.d_vocab)])


def attention_flops(cfg: Config, batch: int, length: int) -> int:
    """The multiplications and additions of q · k and of pattern · v, under the causal mask."""
    pairs = batch * length * (length + 1) // 2
    return cfg.n_layers * 4 * pairs * cfg.n_heads * cfg.d_head


def flops(cfg: Config, work: Work) -> int:
    """The multiplications and additions of a forward pass or of a decoding step."""
    if work.kind == "step":
        context = attention_flops(cfg, work.batch, work.length + 1)
        attention = context - attention_flops(cfg, work.batch, work.length)
        shapes = products(cfg, work.batch, work.batch)
    else:
        rows = work.batch * work.length
        attention = attention_flops(cfg, work.batch, work.length)
        shapes = products(cfg, rows, work.batch if work.last_only else rows)
    return attention + sum(count * shape.flops for shape, count in shapes.items())


def weight_bytes(cfg: Config, dtype: str) -> int:
    """The bytes of all the weight matrices that a decoding step reads."""
    size = 1 if dtype == "int8" else DTYPES[dtype].itemsize
    every = products(cfg, 1, 1).items()
    return sum(count * shape.inputs * shape.outputs for shape, count in every) * size


def cache_bytes(cfg: Config, positions: int, dtype: str) -> int:
    """The bytes of the keys and values of one input at `positions` positions."""
    return 2 * cfg.n_layers * cfg.n_heads * cfg.d_head * positions * DTYPES[dtype].itemsize


def by_mm(weight: Tensor, rows: int) -> Product:
    """A function that multiplies x by `weight` with `torch.mm` (BLAS, or the GPU's library)."""
    out = weight.new_empty(rows, weight.shape[1])
    return lambda x: torch.mm(x, weight, out=out)


def by_mm_transposed(weight: Tensor, rows: int) -> Product:
    """The same as `by_mm`, but the weight is stored as [outputs inputs]."""
    return by_mm(weight.T.contiguous().T, rows)


def by_onednn(weight: Tensor, rows: int) -> Product:
    """A function that multiplies x with oneDNN by the weight, stored as [outputs inputs]."""
    transposed = weight.T.contiguous()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, transposed, None, "none", [], "")


def by_onednn_packed(weight: Tensor, rows: int) -> Product:
    """The same as `by_onednn`, but with the layout of the weight that oneDNN prefers for `rows`."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def in_float32(weight: Tensor, rows: int) -> Product:
    """A function that multiplies with oneDNN in float32, and rounds to the dtype of x.

    On a processor without instructions for half precision, this can be the fastest way.
    """
    multiply = by_onednn(weight.float(), rows)
    return lambda x: multiply(x.float()).to(x.dtype)


WAYS: tuple[Way, ...] = (by_mm, by_mm_transposed, by_onednn, by_onednn_packed, in_float32)


def readings(buffer: Tensor) -> tuple[Callable[[], object], ...]:
    """Functions that each read the whole `buffer` [n]. The processor decides which is fastest."""
    rows = buffer.view(-1, 1024)
    vector = buffer[:1024].clone()
    return (buffer.sum, rows.sum, lambda: rows @ vector)


class Limit(Contestant):
    """A lower bound on time: the roofline model (Williams et al. 2009), product by product.

    A forward pass takes at least as long as its matrix products, each with the fastest kernel for
    its shape. It also takes at least as long as reading every weight once. Decoding a token takes
    at least as long as reading the weights, keys and values. A product is timed several times with
    the same weight. This weight may stay in the processor's cache, so that the product is faster
    than it is in a model.
    """

    title = "the machine"

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        self.cfg = config_from_json(read_json(folder / "config.json"))
        self.fastest: dict[Shape, Callable[[], object]] = {}
        self.buffer = torch.ones(BUFFER // 4, device=device)

    def measure(self, work: Work, at_least: float) -> float:
        """The fewest seconds that `work` can take; for the kind "memory", the fewest bytes.

        Raises `NotImplementedError` for a kind of work that has no known limit.
        """
        match work.kind:
            case "forward" | "capture":
                return self.forward_pass(work, at_least)
            case "train":  # the backward pass has two products for each one of the forward pass
                return 3 * self.forward_pass(work, at_least)
            case "generate":
                first = self.forward_pass(replace(work, last_only=True), at_least)
                lengths = range(work.length + 1, work.length + work.new)
                return first + self.reading(work.batch, lengths, at_least)
            case "step":
                lengths = range(work.length + 1, work.length + work.new + 1)
                return self.reading(work.batch, lengths, at_least) / work.new
            case "import":
                return import_seconds("torch")
            case "memory":
                rows = self.cfg.n_ctx + (0 if self.cfg.tied_unembed else self.cfg.d_vocab)
                tables = rows * self.cfg.d_model * DTYPES[self.dtype].itemsize
                return float(weight_bytes(self.cfg, self.dtype) + tables)
        raise NotImplementedError(f"no limit is known for {work.kind}")

    def forward_pass(self, work: Work, at_least: float) -> float:
        """The fewest seconds for a forward pass.

        This is the time of the products and attention, or the time of reading the weights,
        whichever is longer. Attention is assumed to run at the speed of the products.
        """
        rows = work.batch * work.length
        shapes = products(self.cfg, rows, work.batch if work.last_only else rows)
        each = at_least / len(shapes)
        taken = sum(count * self.product(shape, each) for shape, count in shapes.items())
        multiplied = sum(count * shape.flops for shape, count in shapes.items())
        taken *= 1 + attention_flops(self.cfg, work.batch, work.length) / multiplied
        return max(taken, self.reading(work.batch, [0], at_least))

    def product(self, shape: Shape, at_least: float) -> float:
        """Seconds for a product of `shape`. The first call for a shape finds the fastest kernel."""
        if shape not in self.fastest:
            dtype = DTYPES[self.dtype]
            x = torch.randn(shape.rows, shape.inputs, device=self.device).to(dtype)
            weight = torch.randn(shape.inputs, shape.outputs, device=self.device).to(dtype)
            self.fastest[shape] = fastest(
                [partial(prepared, x, way, weight) for way in WAYS], self.device
            )
        return median_seconds(self.fastest[shape], self.device, at_least)

    def reading(self, batch: int, contexts: Iterable[int], at_least: float) -> float:
        """The fewest seconds for decoding steps on `batch` inputs, in total.

        There is one step for each number of positions in `contexts`. The step reads all weights,
        and the keys and values of that number of positions.
        """
        rate = BUFFER / median_seconds(self.read, self.device, at_least)
        weights = weight_bytes(self.cfg, self.dtype)
        each = (weights + batch * cache_bytes(self.cfg, n, self.dtype) for n in contexts)
        return sum(each) / rate

    @cached_property
    def read(self) -> Callable[[], object]:
        """The fastest function that reads the whole `buffer`."""
        return fastest([lambda call=call: call for call in readings(self.buffer)], self.device)


def prepared(x: Tensor, way: Way, weight: Tensor) -> Callable[[], object]:
    """Convert `weight` to the layout for `way`, and return a function that multiplies x by it."""
    return partial(way(weight, len(x)), x)


def fastest(
    prepare: Iterable[Callable[[], Callable[[], object]]], device: str
) -> Callable[[], object]:
    """Time several functions, and return the fastest. Each item of `prepare` makes one function.

    If a function raises an error, it is skipped: this build of PyTorch or this processor does not
    support it. The first call of each function is a warm-up.
    """
    best, least = None, math.inf
    for make in prepare:
        try:
            call = make()
            taken = seconds(call, device)
            if taken < max(3 * least, HOPELESS):
                taken = median_seconds(call, device, at_least=0.01)
        except (RuntimeError, AttributeError):
            continue
        if taken < least:
            best, least = call, taken
    assert best is not None
    return best
