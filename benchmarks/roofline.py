"""The limit: how fast this machine multiplies in a model's own shapes, and reads memory.

It is a contestant like any other, so that it is measured in the same rounds: its time for a piece of
work is the least that the arithmetic, or the reading of the weights, can take here.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks._timing import median_seconds, seconds
from benchmarks.contestants import DTYPES, Contestant
from benchmarks.fresh import import_seconds
from benchmarks.work import Work
from clean_transformer.config import Config
from clean_transformer.weights.huggingface import config_from_json, read_json

BUFFER = 2**29  # bytes: far more than any processor's cache
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


def products(cfg: Config, rows: int, logit_rows: int) -> list[Shape]:
    """Every product with a weight in a forward pass of as many tokens, in their order."""
    width = cfg.n_heads * cfg.d_head
    block = [
        Shape(rows, cfg.d_model, 3 * width),
        Shape(rows, width, cfg.d_model),
        Shape(rows, cfg.d_model, cfg.d_mlp),
        Shape(rows, cfg.d_mlp, cfg.d_model),
    ]
    return cfg.n_layers * block + [Shape(logit_rows, cfg.d_model, cfg.d_vocab)]


def attention_flops(cfg: Config, batch: int, length: int) -> int:
    """Scores and averages of a causal pass, without the half that the mask leaves out."""
    pairs = batch * length * (length + 1) // 2
    return cfg.n_layers * 4 * pairs * cfg.n_heads * cfg.d_head


def weight_bytes(cfg: Config, dtype: str) -> int:
    """What decoding a token must read: every matrix that multiplies, and little else."""
    size = 1 if dtype == "int8" else DTYPES[dtype].itemsize
    return sum(shape.inputs * shape.outputs for shape in products(cfg, 1, 1)) * size


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


WAYS = (by_mm, by_mm_transposed, by_onednn, by_onednn_packed, in_float32)


class Limit(Contestant):
    """What no implementation can beat: the products alone, or the reading alone."""

    title = "the machine"

    def __init__(self, folder: Path, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        self.cfg = config_from_json(read_json(folder / "config.json"))
        self.weights = [
            torch.randn(shape.inputs, shape.outputs, device=device, dtype=DTYPES[dtype])
            for shape in products(self.cfg, 1, 1)
        ]
        self.chosen: dict[tuple[int, int], list[tuple[Product, Tensor]]] = {}
        self.buffer = torch.ones(BUFFER // 4, device=device)

    def measure(self, work: Work, at_least: float) -> float:
        """The least seconds, or bytes, for that work."""
        match work.kind:
            case "forward" | "capture":
                logit_rows = work.batch if work.last_only else work.batch * work.length
                return self.arithmetic(work.batch, work.length, logit_rows, at_least)
            case "train":  # the backward pass multiplies twice for each product
                rows = work.batch * work.length
                return 3 * self.arithmetic(work.batch, work.length, rows, at_least)
            case "generate":
                prefill = self.arithmetic(work.batch, work.length, work.batch, at_least)
                steps = range(work.length + 1, work.length + work.new)
                return prefill + self.reading(work.batch, steps, at_least)
            case "step":
                steps = range(work.length + 1, work.length + work.new + 1)
                return self.reading(work.batch, steps, at_least) / work.new
            case "import":
                return import_seconds("torch")
            case "memory":
                tables = self.cfg.n_ctx + (0 if self.cfg.tied_unembed else self.cfg.d_vocab)
                extra = tables * self.cfg.d_model * DTYPES[self.dtype].itemsize
                return weight_bytes(self.cfg, self.dtype) + extra
        raise NotImplementedError(f"no limit is known for {work.kind}")

    def arithmetic(self, batch: int, length: int, logit_rows: int, at_least: float) -> float:
        """Seconds for a forward pass's products, in the best library for each shape."""
        rows = batch * length
        if (rows, logit_rows) not in self.chosen:
            self.chosen = {(rows, logit_rows): self.choose(rows, logit_rows)}
        best = self.chosen[rows, logit_rows]

        def multiply_all() -> None:
            for multiply, x in best:
                multiply(x)

        taken = median_seconds(multiply_all, self.device, at_least)
        flops = sum(shape.flops for shape in products(self.cfg, rows, logit_rows))
        return taken * (1 + attention_flops(self.cfg, batch, length) / flops)

    def choose(self, rows: int, logit_rows: int) -> list[tuple[Product, Tensor]]:
        """For each product its fastest way, tried on the first of its shape."""
        fastest: dict[Shape, Way] = {}
        chosen = []
        for shape, weight in zip(products(self.cfg, rows, logit_rows), self.weights, strict=True):
            x = torch.randn(shape.rows, shape.inputs, device=self.device, dtype=weight.dtype)
            if shape not in fastest:
                times = {way: self.least_seconds(way, weight, x) for way in WAYS}
                fastest[shape] = min(times, key=times.__getitem__)
            chosen.append((fastest[shape](weight, shape.rows), x))
        return chosen

    def least_seconds(self, way: Way, weight: Tensor, x: Tensor) -> float:
        """Of three tries; infinity for what this machine does not have."""
        try:
            multiply = way(weight, len(x))
            return min(seconds(lambda: multiply(x), self.device) for _ in range(3))
        except (RuntimeError, AttributeError):
            return math.inf

    def reading(self, batch: int, contexts: Iterable[int], at_least: float) -> float:
        """Seconds to read the weights once, and the keys and values, for each of the steps."""
        rate = BUFFER / median_seconds(self.buffer.sum, self.device, at_least)
        weights = weight_bytes(self.cfg, self.dtype)
        each = (weights + batch * cache_bytes(self.cfg, n, self.dtype) for n in contexts)
        return sum(each) / rate
