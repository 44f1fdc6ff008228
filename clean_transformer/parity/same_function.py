"""Checks whether our model is the same function as another implementation of GPT-2.

The other implementation is called the reference (see `parity/references`). Every activation of the
two models is compared in float64.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.parity.references.base import (
    LOGITS,
    POSITIONS,
    TOKENS,
    Reference,
    everything,
)
from clean_transformer.parity.verdict import SAME_FUNCTION, Verdict, worst

# The activations that are compared on a text of n_ctx tokens: the residual stream and the logits.
# The other activations would not fit into memory: attention scores have n_ctx² elements per head.
LONG = ("hook_embed", "hook_pos_embed", "hook_resid_mid", "hook_resid_post", LOGITS)
# `compare_tensors` compares this many numbers at a time.
AT_ONCE = 2**24


@dataclass(frozen=True)
class Comparison:
    """One activation of the reference, compared with the same activation of our model.

    `key` is the activation's name in the reference's cache. `name` is our name for the activation,
    or empty if our model has no such activation. Let "ours" be the activation's value in our model,
    and "theirs" its value in the reference. `scale` is the root mean square of "theirs". `error` is
    the largest |ours − theirs| / (|theirs| + scale) of all elements. An error of at most
    `tolerance` passes. `note` says why the two activations could not be compared, or is empty.
    `case` is the shape of the tokens, such as "2 × 33 tokens".
    """

    key: str
    name: str
    error: float
    scale: float
    tolerance: float
    note: str = ""
    case: str = ""

    @property
    def verdict(self) -> Verdict:
        """NOT CHECKED if `name` is empty; otherwise PASS up to the tolerance, and WRONG above it.

        The verdict is also WRONG if the error is NaN.
        """
        if not self.name:
            return Verdict.NOT_CHECKED
        return Verdict.PASS if self.error <= self.tolerance else Verdict.WRONG


@dataclass(frozen=True)
class ParityReport:
    """The answer to the question whether our model is the same function as the reference.

    `reference` is the name and version of another implementation of GPT-2. `rows` has one
    comparison for each activation in this reference's cache, in the order of the cache. If the
    models also ran on a text of n_ctx tokens, the comparisons on this text follow (see `LONG`).
    `weights` is a sentence that says which code read the weights of the reference. If our loader
    read them, the comparison cannot find a fault of our loader.
    """

    reference: str
    rows: list[Comparison]
    weights: str = ""

    @property
    def coverage(self) -> tuple[int, int]:
        """How many activations in the reference's cache were compared, and how many there are."""
        return len({row.key for row in self.rows if row.name}), len({row.key for row in self.rows})

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the comparisons."""
        return worst(row.verdict for row in self.rows)

    @property
    def first_failure(self) -> Comparison | None:
        """The first comparison that has the worst verdict, or None if everything passed."""
        failures = (row for row in self.rows if row.verdict is self.verdict)
        return None if self.verdict is Verdict.PASS else next(failures, None)


@torch.no_grad()
def compare(
    model: DemoTransformer,
    reference: Reference,
    tokens: Int[Tensor, "batch pos"],
    tolerance: float = SAME_FUNCTION,
    keep: Callable[[str], bool] = everything,
) -> ParityReport:
    """Run both models on the tokens, and compare every activation that the reference caches.

    `reference` is another implementation of GPT-2. Both models must have the same weights, in
    float64. A `Comparison` passes if its `error` is at most `tolerance`. An activation is compared
    only if `keep(name)` is true, where `name` is our name for the activation.
    """
    some = () if keep is everything else (lambda key: keep(reference.name(key)),)
    theirs = {
        key: value
        for key, value in reference.run(tokens, *some).items()
        if keep(reference.name(key))
    }
    names = {key: reference.name(key) for key in theirs}
    modules = {name for name, _ in model.named_modules()}
    logits, cache = _watched(model, tokens, modules & set(names.values()))
    positions = torch.arange(tokens.shape[1]).expand(1, -1)
    ours = {**cache, LOGITS: logits, TOKENS: tokens, POSITIONS: positions}
    rows = []
    for key, name in names.items():
        if name in ours:
            rows.append(compare_tensors(key, name, ours[name], theirs[key], tolerance))
        elif name in modules:
            note = "our model did not compute it"
            rows.append(Comparison(key, name, torch.inf, 1.0, tolerance, note))
        else:
            note = "our model has no such activation"
            rows.append(Comparison(key, "", 0.0, 1.0, tolerance, note))
    case = f"{tokens.shape[0]} × {tokens.shape[1]} tokens"
    return ParityReport(reference.title, [replace(row, case=case) for row in rows])


def _watched(
    model: DemoTransformer, tokens: Int[Tensor, "batch pos"], names: set[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the model. Return the logits, and the outputs of the modules in `names` that ran."""
    # `run_with_cache` would raise an error for a module that does not run.
    cache: dict[str, Tensor] = {}

    def keep(name: str, _: object, args: object, output: Tensor) -> None:
        cache[name] = output

    with ExitStack() as placed:
        for name in names - {""}:
            hook = partial(keep, name)
            placed.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        return model(tokens), cache


def is_in_long(name: str) -> bool:
    """Whether the activation is compared on a text of n_ctx tokens (see `LONG`)."""
    return name.split(".")[-1] in LONG


def compare_tensors(
    key: str, name: str, ours: Tensor, theirs: Tensor, tolerance: float
) -> Comparison:
    """Compare two activations in float64 on the CPU.

    The error is infinite if the shapes differ, if an element is NaN, or if only one of two elements
    is infinite.
    """
    if ours.shape != theirs.shape:
        note = f"shape {[*ours.shape]} instead of {[*theirs.shape]}"
        return Comparison(key, name, torch.inf, 1.0, tolerance, note)
    # The logits of a long text are large, so we compare a part of the numbers at a time.
    parts = [torch.split(tensor.cpu().flatten(), AT_ONCE) for tensor in (ours, theirs)]
    squares, count = 0.0, 0
    for part in parts[1]:
        finite = part[part.isfinite()].double()
        squares, count = squares + float(finite.square().sum()), count + finite.numel()
    scale = math.sqrt(squares / count) if count else 0.0
    error = 0.0
    for mine, other in zip(*parts, strict=True):
        exact, wanted = mine.double(), other.double()
        # Masked scores are −inf in both activations, and −inf − (−inf) is NaN.
        relative = (exact - wanted).abs() / (wanted.abs() + scale)
        errors = torch.where(exact == wanted, 0.0, relative).nan_to_num(math.inf, math.inf)
        error = max(error, float(errors.max()) if errors.numel() else 0.0)
    return Comparison(key, name, error, scale, tolerance)
