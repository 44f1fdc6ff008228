"""Question 1: is it the same function? Compares every activation with a reference's, in float64."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.parity.references.base import LOGITS, POSITIONS, TOKENS, Reference
from clean_transformer.parity.verdict import SAME_FUNCTION, Verdict, worst


@dataclass(frozen=True)
class Comparison:
    """One entry of the reference's cache, compared with our activation of the same place.

    `error` is the largest |ours − theirs| / (|theirs| + scale) of any element. `scale` is the root
    mean square of theirs. `name` is our activation, empty where we have none.
    """

    key: str
    name: str
    error: float
    scale: float
    tolerance: float
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """PASS within the tolerance, WRONG above it or for NaN, NOT CHECKED if `name` is empty."""
        if not self.name:
            return Verdict.NOT_CHECKED
        return Verdict.PASS if self.error <= self.tolerance else Verdict.WRONG


@dataclass(frozen=True)
class ParityReport:
    """A comparison for every key of the reference's cache, in the cache's order."""

    reference: str
    rows: list[Comparison]

    @property
    def coverage(self) -> tuple[int, int]:
        """The numbers of compared keys and of cached keys."""
        return sum(bool(row.name) for row in self.rows), len(self.rows)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the rows."""
        return worst(row.verdict for row in self.rows)

    @property
    def first_failure(self) -> Comparison | None:
        """The first row, in the order of the forward pass, that has the worst verdict.

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

    Both must have the same weights in float64; `tolerance` is relative to an activation's scale.
    """
    theirs = reference.run(tokens)
    names = {key: reference.aliases.get(key, key) for key in theirs}
    modules = {name for name, _ in model.named_modules()}
    logits, cache = model.run_with_cache(tokens, names=sorted(modules & set(names.values())))
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
    """Compare two activations in float64 on the CPU; another shape is an infinite error."""
    if ours.shape != theirs.shape:
        note = f"shape {[*ours.shape]} instead of {[*theirs.shape]}"
        return Comparison(key, name, torch.inf, 1.0, tolerance, note)
    ours, theirs = ours.double().cpu(), theirs.double()
    scale = theirs[theirs.isfinite()].square().mean().sqrt()
    # Masked scores are −inf in both, and −inf − (−inf) is NaN.
    error = torch.where(ours == theirs, 0.0, (ours - theirs).abs() / (theirs.abs() + scale))
    return Comparison(key, name, float(error.max()), float(scale), tolerance)
