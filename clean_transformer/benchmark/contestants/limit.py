"""The limit: how fast this machine multiplies in a model's own shapes, and reads memory.

It is a contestant like any other, so that it is measured in the same rounds: its time for a piece
of work is the least that the arithmetic, or the reading of the weights, can take here.
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

from clean_transformer.benchmark.contestants.ours import DTYPES, Contestant
from clean_transformer.benchmark.running.timing import import_seconds, median_seconds, seconds
from clean_transformer.benchmark.work import Work
from clean_transformer.config import Config
from clean_transformer.weights.formats.huggingface import config_from_json, read_json

BUFFER = 2**29  # bytes: far more than any processor's cache


HOPELESS = 0.3  # seconds


Product = Callable[[Tensor], Tensor]


Way = Callable[[Tensor, int], Product]


class Shape(NamedTuple):
    """[rows, inputs] × [inputs, outputs]."""

    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inputs * self.outputs


def products(cfg: Config, rows: int, logit_rows: int) -> dict[Shape, int]:
    """Every product with a weight in a forward pass of as many tokens, and how often it comes."""
    width = cfg.n_heads * cfg.d_head
    block = (
        Shape(rows, cfg.d_model, 3 * width),
        Shape(rows, width, cfg.d_model),
        Shape(rows, cfg.d_model, cfg.d_mlp),
        Shape(rows, cfg.d_mlp, cfg.d_model),
    )
    return Counter([*cfg.n_layers * block, Shape(logit_rows, cfg.d_model, cfg.d_vocab)])


def attention_flops(cfg: Config, batch: int, length: int) -> int:
    """Scores and averages of a causal pass, without the half that the mask leaves out."""
    pairs = batch * length * (length + 1) // 2
    return cfg.n_layers * 4 * pairs * cfg.n_heads * cfg.d_head


def flops(cfg: Config, work: Work) -> int:
    """What a forward pass, or a decoding step, cannot do without."""
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
    """What decoding a token must read: every matrix that multiplies, and little else."""
    size = 1 if dtype == "int8" else DTYPES[dtype].itemsize
    every = products(cfg, 1, 1).items()
    return sum(count * shape.inputs * shape.outputs for shape, count in every) * size


def cache_bytes(cfg: Config, positions: int, dtype: str) -> int:
    """The keys and values of one input's positions."""
    return 2 * cfg.n_layers * cfg.n_heads * cfg.d_head * positions * DTYPES[dtype].itemsize


def by_mm(weight: Tensor, rows: int) -> Product:
    """The BLAS, or the GPU's library, on the weight [inputs outputs]."""
    out = weight.new_empty(rows, weight.shape[1])
    return lambda x: torch.mm(x, weight, out=out)


def by_mm_transposed(weight: Tensor, rows: int) -> Product:
    """The same on a weight that lies in memory as [outputs inputs]."""
    return by_mm(weight.T.contiguous().T, rows)


def by_onednn(weight: Tensor, rows: int) -> Product:
    """oneDNN on a weight [outputs inputs]."""
    transposed = weight.T.contiguous()
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, transposed, None, "none", [], "")


def by_onednn_packed(weight: Tensor, rows: int) -> Product:
    """oneDNN on a weight in the order that it prefers for as many rows."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def in_float32(weight: Tensor, rows: int) -> Product:
    """In float32 and rounded: for processors that multiply nothing narrower."""
    multiply = by_onednn(weight.float(), rows)
    return lambda x: multiply(x.float()).to(x.dtype)


WAYS: tuple[Way, ...] = (by_mm, by_mm_transposed, by_onednn, by_onednn_packed, in_float32)


def readings(buffer: Tensor) -> tuple[Callable[[], object], ...]:
    """Ways to read the whole buffer [n], of which processors differ in the fastest."""
    rows = buffer.view(-1, 1024)
    vector = buffer[:1024].clone()
    return (buffer.sum, rows.sum, lambda: rows @ vector)


class Limit(Contestant):
    """What no implementation can beat: the roofline of Williams et al. 2009, product by product.

    A forward pass takes at least as long as its products, each in the fastest library for its
    shape, and as reading every weight once; a decoded token as long as reading the weights and the
    keys and values. The products are timed on one weight each, which may stay in the cache.
    """

    title = "the machine"

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        self.cfg = config_from_json(read_json(folder / "config.json"))
        self.fastest: dict[Shape, Callable[[], object]] = {}
        self.buffer = torch.ones(BUFFER // 4, device=device)

    def measure(self, work: Work, at_least: float) -> float:
        """The least seconds, or bytes, for that work."""
        match work.kind:
            case "forward" | "capture":
                return self.forward_pass(work, at_least)
            case "train":  # the backward pass multiplies twice for each product
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
                return weight_bytes(self.cfg, self.dtype) + tables
        raise NotImplementedError(f"no limit is known for {work.kind}")

    def forward_pass(self, work: Work, at_least: float) -> float:
        """Seconds for the products and the attention, or for reading the weights."""
        rows = work.batch * work.length
        shapes = products(self.cfg, rows, work.batch if work.last_only else rows)
        each = at_least / len(shapes)
        taken = sum(count * self.product(shape, each) for shape, count in shapes.items())
        multiplied = sum(count * shape.flops for shape, count in shapes.items())
        taken *= 1 + attention_flops(self.cfg, work.batch, work.length) / multiplied
        return max(taken, self.reading(work.batch, [0], at_least))

    def product(self, shape: Shape, at_least: float) -> float:
        """Seconds for one product, by its fastest way, which is found the first time."""
        if shape not in self.fastest:
            dtype = DTYPES[self.dtype]
            x = torch.randn(shape.rows, shape.inputs, device=self.device).to(dtype)
            weight = torch.randn(shape.inputs, shape.outputs, device=self.device).to(dtype)
            self.fastest[shape] = fastest(
                [partial(prepared, x, way, weight) for way in WAYS], self.device
            )
        return median_seconds(self.fastest[shape], self.device, at_least)

    def reading(self, batch: int, contexts: Iterable[int], at_least: float) -> float:
        """Seconds to read the weights, and the keys and values, for each of the steps."""
        rate = BUFFER / median_seconds(self.read, self.device, at_least)
        weights = weight_bytes(self.cfg, self.dtype)
        each = (weights + batch * cache_bytes(self.cfg, n, self.dtype) for n in contexts)
        return sum(each) / rate

    @cached_property
    def read(self) -> Callable[[], object]:
        """The fastest way to read the buffer."""
        return fastest([lambda call=call: call for call in readings(self.buffer)], self.device)


def prepared(x: Tensor, way: Way, weight: Tensor) -> Callable[[], object]:
    """The product, with the weight laid out as that way likes it."""
    return partial(way(weight, len(x)), x)


def fastest(
    prepare: Iterable[Callable[[], Callable[[], object]]], device: str
) -> Callable[[], object]:
    """Of several ways the one with the least time, without what is not there.

    The first call of each warms up; one that was hopelessly slow is not repeated.
    """
    best, least = None, math.inf
    for make in prepare:
        try:
            call = make()
            taken = seconds(call, device)
            if taken < max(3 * least, HOPELESS):
                taken = median_seconds(call, device, at_least=0.01)
        except (RuntimeError, AttributeError):  # this build or processor does not have it
            continue
        if taken < least:
            best, least = call, taken
    assert best is not None
    return best
