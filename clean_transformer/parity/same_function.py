"""Question 1: is our model the same function as the reference?

Compares every activation of the two models in float64.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.parity.references.base import LOGITS, POSITIONS, TOKENS, Reference
from clean_transformer.parity.verdict import SAME_FUNCTION, Verdict, worst


@dataclass(frozen=True)
class Comparison:
    """One activation of the reference, compared with the same activation of our model.

    `key` is the activation's name in the reference's cache. `name` is our name for the activation,
    or empty if our model has no such activation. Let "ours" and "theirs" be the values of our model
    and of the reference. `scale` is the root mean square of "theirs". `error` is the largest
    |ours − theirs| / (|theirs| + scale) of all elements. An error up to `tolerance` passes. `note`
    says why the two activations could not be compared, or is empty.
    """

    key: str
    name: str
    error: float
    scale: float
    tolerance: float
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """NOT CHECKED if `name` is empty; otherwise PASS up to the tolerance, and WRONG above it.

        A NaN error is WRONG.
        """
        if not self.name:
            return Verdict.NOT_CHECKED
        return Verdict.PASS if self.error <= self.tolerance else Verdict.WRONG


@dataclass(frozen=True)
class ParityReport:
    """The answer to question 1.

    `reference` is the name of the reference with its version. `rows` has one comparison for each
    key of the reference's cache, in the order of the cache.
    """

    reference: str
    rows: list[Comparison]

    @property
    def coverage(self) -> tuple[int, int]:
        """How many keys of the cache were compared, and how many keys the cache has."""
        return sum(bool(row.name) for row in self.rows), len(self.rows)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the rows."""
        return worst(row.verdict for row in self.rows)

    @property
    def first_failure(self) -> Comparison | None:
        """The first row that has the worst verdict, in the order of `rows`.

        None if everything passed.
        """
        failures = (row for row in self.rows if row.verdict is self.verdict)
        return None if self.verdict is Verdict.PASS else next(failures, None)


@torch.no_grad()
def compare(
    model: DemoTransformer,
    reference: Reference,
    tokens: Int[Tensor, "batch pos"],
    tolerance: float = SAME_FUNCTION,
) -> ParityReport:
    """Run both models on the tokens and compare every activation that the reference caches.

    Both models must have the same weights, in float64. A `Comparison` passes if its `error` is at
    most `tolerance`.
    """
    theirs = reference.run(tokens)
    names = {key: reference.aliases.get(key, key) for key in theirs}
    modules = {name for name, _ in model.named_modules()}
    logits, cache = model.run_with_cache(tokens, names_filter=sorted(modules & set(names.values())))
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
    return ParityReport(reference.title, rows)


def compare_tensors(
    key: str, name: str, ours: Tensor, theirs: Tensor, tolerance: float
) -> Comparison:
    """Compare two activations in float64 on the CPU. Different shapes give an infinite error."""
    if ours.shape != theirs.shape:
        note = f"shape {[*ours.shape]} instead of {[*theirs.shape]}"
        return Comparison(key, name, torch.inf, 1.0, tolerance, note)
    ours, theirs = ours.double().cpu(), theirs.double()
    scale = theirs[theirs.isfinite()].square().mean().sqrt()
    # Masked scores are −inf in both activations, and −inf − (−inf) is NaN.
    error = torch.where(ours == theirs, 0.0, (ours - theirs).abs() / (theirs.abs() + scale))
    return Comparison(key, name, float(error.max()), float(scale), tolerance)
