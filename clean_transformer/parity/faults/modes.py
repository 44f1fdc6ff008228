"""Faults that change the results of only optimized or compiled models."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clean_transformer.inference import fast_modules
from clean_transformer.inference.fast_modules import CompiledStep, FastBlock, FastUnembed
from clean_transformer.inference.matmuls import Matmul, OneDNN, OneDNNGelu
from clean_transformer.parity.faults.semantic.edits import Changes, Edit, planted, result


@dataclass(frozen=True)
class ModeFault:
    """A fault of the code that runs in `mode`, one of the suite's modes (see `parity/modes.py`).

    `part` is an `fnmatch` pattern for the name of the first wrong result in a report, such as
    "blocks.0". `changes` has the changes to our code or to `torch.compile` that plant the fault.
    """

    name: str
    description: str
    mode: str
    part: str
    changes: Changes

    def plant(self) -> AbstractContextManager[Any]:
        """Return a context manager that plants the fault inside a `with` block."""
        return planted(self.changes)


def scaled(x: Tensor) -> Tensor:
    """Return x times 1 + 2⁻⁹."""
    return x * (1 + 2**-9)


def of_one_token(edit: Edit) -> Edit:
    """Return a function that applies `edit` only to tensors [batch pos …] in which pos is 1."""
    return lambda x: edit(x) if x.ndim == 3 and x.shape[1] == 1 else x


def compiled_as(graph: Callable[[Any], Callable[..., Any]]) -> Changes:
    """Return the changes that let `torch.compile(function)` return `graph(function)`."""
    return ((torch, "compile", lambda _: lambda function, **options: graph(function)),)


def compiled_with(edit: Edit) -> Changes:
    """Return the changes that let every compiled function return edit(right result)."""
    return compiled_as(lambda function: lambda *args, **kw: edit(function(*args, **kw)))


def step_as(graph: Callable[[Any], Callable[..., Any]]) -> Changes:
    """Return the changes that let the compiled decoding step be `graph(uncompiled step)`."""

    def change(over: Any) -> Any:
        def faulty(self: CompiledStep, below: Any) -> CompiledStep:
            self.below, self.graph = below, graph(below)
            return self

        return faulty

    return ((CompiledStep, "over", change),)


def first_logits_again(step: Any) -> Callable[..., Any]:
    """Return a decoding step that returns the logits of its first call in every later call."""
    kept: list[Tensor] = []

    def graph(*given: Any) -> Tensor:
        kept.append(step(*given))
        return kept[0]

    return graph


def slot_moved(by: int, position: bool) -> Callable[[Any], Callable[..., Any]]:
    """Return a function that makes a decoding step write keys and values `by` slots too far.

    If `position` is True, the slot is right, and the token's position is too large by `by`.
    """

    def graph_of(step: Any) -> Callable[..., Any]:
        def graph(tokens: Tensor, cache: Any, *rest: Any) -> Tensor:
            if position:
                cache.padding = cache.padding - by
            else:
                cache.slot += by
            logits: Tensor = step(tokens, cache, *rest)
            if position:
                cache.padding = cache.padding + by
            else:
                cache.slot -= by
            return logits

        return graph

    return graph_of


MODE_FAULTS = (
    ModeFault(
        "optimized-mask-dropped",
        "an optimized block ignores the mask of a padded batch",
        "optimized",
        "blocks.0",
        ((fast_modules, "mix_fused", lambda right: lambda q, k, v, mask: right(q, k, v, None)),),
    ),
    ModeFault(
        "optimized-gelu-exact",
        "an optimized block computes the exact GELU",
        "optimized",
        "blocks.0",
        tuple(
            (kernel, "gelu", lambda _: lambda self, x, weight: F.gelu(self(x, weight)))
            for kernel in (Matmul, OneDNN, OneDNNGelu)
        ),
    ),
    ModeFault(
        "optimized-residual-scaled",
        "the output of an optimized block is 0.2% too large",
        "optimized",
        "blocks.0",
        result(FastBlock, scaled, "__call__"),
    ),
    ModeFault(
        "optimized-one-token",
        "the output of an optimized block for one token has its columns shifted",
        "optimized",
        "blocks.0",
        result(FastBlock, of_one_token(lambda x: x.roll(1, -1)), "__call__"),
    ),
    ModeFault(
        "optimized-unembedding",
        "the logits of an optimized unembedding are those of the token before",
        "optimized",
        "unembed",
        result(FastUnembed, lambda logits: logits.roll(1, -1), "__call__"),
    ),
    ModeFault(
        "compiled-scaled",
        "what a compiled module returns is 0.2% too large",
        "compiled",
        "*",
        compiled_with(scaled),
    ),
    ModeFault(
        "compiled-bfloat16",
        "what a compiled module returns is rounded to bfloat16",
        "compiled",
        "*",
        compiled_with(lambda x: x.bfloat16().to(x.dtype)),
    ),
    ModeFault(
        "compiled-one-token",
        "what a compiled module returns for one token has its columns shifted",
        "compiled",
        "*",
        compiled_with(of_one_token(lambda x: x.roll(1, -1))),
    ),
    ModeFault(
        "step-scaled",
        "the logits of the compiled step are 0.2% too large",
        "optimized-compiled",
        "step 1, logits",
        step_as(lambda step: lambda *given: scaled(step(*given))),
    ),
    ModeFault(
        "step-first-logits-again",
        "the compiled step returns the logits of its first call again",
        "optimized-compiled",
        "step 2, logits",
        step_as(first_logits_again),
    ),
    ModeFault(
        "step-position-late",
        "the compiled step reads the next position",
        "optimized-compiled",
        "step 1, logits",
        step_as(slot_moved(1, position=True)),
    ),
    ModeFault(
        "step-writes-early",
        "the compiled step writes its keys and values one slot too early",
        "optimized-compiled",
        "step 1, logits",
        step_as(slot_moved(-1, position=False)),
    ),
)
