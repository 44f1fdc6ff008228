"""Computes the limit: the shortest time in which this machine could do the work.

The limit is computed from two measurements: the times of matrix products with the model's shapes,
and the speed at which the machine reads memory.
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
from clean_transformer.inference.huge_pages import use_huge_pages
from clean_transformer.weights.files import read_json
from clean_transformer.weights.formats.huggingface import config_from_json

BUFFER = 2**29  # bytes; far larger than a processor's cache, so the data is read from memory

# If the first call of a kernel takes longer than this many seconds, and also longer than 3 × the
# time of the best kernel so far, the kernel is not called again.
HOPELESS = 0.3

# A function that multiplies x [rows inputs] by a fixed weight.
Product = Callable[[Tensor], Tensor]

# A function that takes a weight [inputs outputs] and a number of rows. It returns a `Product` that
# multiplies an x with this number of rows by the weight.
Way = Callable[[Tensor, int], Product]


class Shape(NamedTuple):
    """The sizes of a matrix product: [rows inputs] × [inputs outputs]."""

    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        """The number of multiplications and additions."""
        return 2 * self.rows * self.inputs * self.outputs


def products(cfg: Config, rows: int, logit_rows: int) -> dict[Shape, int]:
    """Count the matrix products in a forward pass over `rows` tokens, by shape.

    Only products with a weight are counted, not q · k and pattern · v. `logit_rows` is the number
    of positions whose logits are computed.
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
    """Return how many multiplications and additions q · k and pattern · v need in all layers.

    Only pairs of a query and a key that the causal mask allows are counted.
    """
    pairs = batch * length * (length + 1) // 2
    return cfg.n_layers * 4 * pairs * cfg.n_heads * cfg.d_head


def flops(cfg: Config, work: Work) -> int:
    """Return how many multiplications and additions `work` needs.

    If the kind of `work` is "step", this is the number for one decoding step, otherwise the number
    for a forward pass.
    """
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
    """Return the number of bytes of all weight matrices that one decoding step reads."""
    size = 1 if dtype == "int8" else DTYPES[dtype].itemsize
    every = products(cfg, 1, 1).items()
    return sum(count * shape.inputs * shape.outputs for shape, count in every) * size


def cache_bytes(cfg: Config, positions: int, dtype: str) -> int:
    """Return the number of bytes of one input's keys and values at `positions` positions."""
    return 2 * cfg.n_layers * cfg.n_heads * cfg.d_head * positions * DTYPES[dtype].itemsize


def by_mm(weight: Tensor, rows: int) -> Product:
    """Return a function that multiplies x by `weight` with `torch.mm`."""
    out = weight.new_empty(rows, weight.shape[1])
    return lambda x: torch.mm(x, weight, out=out)


def by_mm_transposed(weight: Tensor, rows: int) -> Product:
    """Return a function that calls `torch.mm` with x and a weight stored as [outputs inputs]."""
    return by_mm(weight.T.contiguous().T, rows)


def by_onednn(weight: Tensor, rows: int) -> Product:
    """Return a function that multiplies x by the weight with oneDNN.

    The weight is stored as [outputs inputs].
    """
    transposed = weight.T.contiguous()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, transposed, None, "none", [], "")


def by_onednn_packed(weight: Tensor, rows: int) -> Product:
    """Return a function that multiplies x by the weight with oneDNN, in oneDNN's own layout.

    oneDNN chooses the layout of the weight that is best for an x with `rows` rows.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def in_float32(weight: Tensor, rows: int) -> Product:
    """Return a function that multiplies with oneDNN in float32, and rounds to the dtype of x."""
    # This can be the fastest function on a processor without instructions for half precision.
    multiply = by_onednn(weight.float(), rows)
    return lambda x: multiply(x.float()).to(x.dtype)


WAYS: tuple[Way, ...] = (by_mm, by_mm_transposed, by_onednn, by_onednn_packed, in_float32)


def readings(buffer: Tensor) -> tuple[Callable[[], object], ...]:
    """Return several functions that read the whole `buffer` [n], to choose the fastest of them."""
    rows = buffer.view(-1, 1024)
    vector = buffer[:1024].clone()
    # Which of these functions is fastest depends on the processor.
    return (buffer.sum, rows.sum, lambda: rows @ vector)


class Limit(Contestant):
    """Computes a lower bound on time with the roofline model (Williams et al. 2009).

    A forward pass takes at least the time that its matrix products need, each on the fastest kernel
    for its shape. A forward pass also takes at least as long as reading every weight once. Decoding
    a token takes at least as long as reading the weights, keys and values. The products here can be
    faster than the same products in a model: each product is timed several times with the same
    weight, which may then be in the processor's cache.
    """

    title = "the machine"

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        self.cfg = config_from_json(read_json(folder / "config.json"))
        self.fastest: dict[Shape, Callable[[], object]] = {}
        self.buffer = torch.ones(BUFFER // 4, device=device)
        use_huge_pages(self.buffer)

    def measure(self, work: Work, at_least: float) -> float:
        """Return the fewest seconds that `work` can take; for the kind "memory", the fewest bytes.

        Here and in the other methods, each measurement is repeated until `at_least` seconds have
        passed. Raises `NotImplementedError` for a kind of work that has no known limit.
        """
        match work.kind:
            case "forward" | "capture":
                return self.forward_pass(work, at_least)
            case "train":  # for each product of the forward pass, the backward pass has two
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
        """Return the fewest seconds for a forward pass.

        There are two lower bounds: the time to compute the matrix products and attention, and the
        time to read the weights. The result is the larger bound. Attention is assumed to do as many
        multiplications per second as the matrix products.
        """
        rows = work.batch * work.length
        shapes = products(self.cfg, rows, work.batch if work.last_only else rows)
        each = at_least / len(shapes)
        taken = sum(count * self.product(shape, each) for shape, count in shapes.items())
        multiplied = sum(count * shape.flops for shape, count in shapes.items())
        taken *= 1 + attention_flops(self.cfg, work.batch, work.length) / multiplied
        return max(taken, self.reading(work.batch, [0], at_least))

    def product(self, shape: Shape, at_least: float) -> float:
        """Return the seconds that a product of `shape` takes on the fastest kernel.

        The first call for a shape finds the fastest kernel for this shape.
        """
        if shape not in self.fastest:
            dtype = DTYPES[self.dtype]
            x = torch.randn(shape.rows, shape.inputs, device=self.device).to(dtype)
            weight = torch.randn(shape.inputs, shape.outputs, device=self.device).to(dtype)
            self.fastest[shape] = fastest(
                [partial(prepared, x, way, weight) for way in WAYS], self.device
            )
        return median_seconds(self.fastest[shape], self.device, at_least)

    def reading(self, batch: int, contexts: Iterable[int], at_least: float) -> float:
        """Return the fewest seconds for several decoding steps on `batch` inputs, in total.

        There is one step for each entry n of `contexts`. The step reads all weights, and the keys
        and values of n positions.
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
    """Return a function without arguments that multiplies x by `weight` with the kernel `way`."""
    return partial(way(weight, len(x)), x)


def fastest(
    prepare: Iterable[Callable[[], Callable[[], object]]], device: str
) -> Callable[[], object]:
    """Time several functions, and return the fastest function.

    Each item of `prepare` is called once, and returns one of these functions. A function that
    raises an error is skipped, because this build of PyTorch or this processor does not support the
    function. The first call of each function is a warm-up.
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
