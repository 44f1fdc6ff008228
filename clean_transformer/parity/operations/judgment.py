"""Judges a call of an ATen operation: compares the device's outputs with the exact outputs."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from clean_transformer.parity.limits import (
    error_ratios,
    index_of_largest,
    lower_precision,
    verdict_of,
)
from clean_transformer.parity.operations.replay import Expected
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, smallest_kept, trusted
from clean_transformer.parity.verdict import Verdict


@dataclass(frozen=True)
class Judgment:
    """The verdict on one call of an operation, and the error of its worst output.

    `output` is the index of the worst output in the list of the call's outputs. `ratio` is the
    largest error in this output, in units of one rounding error. This unit is u G + η for each
    element: u is the unit roundoff, G is the sum of the absolute values of the terms that the
    operation adds up, and η is the underflow threshold (see `parity/limits.py`). `worst` is the
    index of the element with this ratio. `ratio` is infinite if an error is NaN, or if the output
    has a wrong shape.

    If the operation does not round, but the output differs from the exact output, `must_equal` is
    True and `ratio` is infinite. `bits` is the number of correct bits: −log₂ of the root mean
    square of |device − exact| / G. `precision` names a lower precision that explains the error,
    such as "TF32", or is empty.

    The verdict is NOT CHECKED if the error is too large, but the limits of the operation are
    estimates (see `Expected.proves`).

    `healthy` is the largest ratio that is allowed, and `unit` is u G + η of the element at `worst`.
    So the error of this element may be at most `healthy` · `unit`.
    """

    verdict: Verdict
    ratio: float = 0.0
    bits: float = math.inf
    output: int = 0
    worst: tuple[int, ...] = ()
    precision: str = ""
    must_equal: bool = False
    healthy: float = 0.0
    unit: float = 0.0


def judge(expected: list[Expected | None], output: Any) -> Judgment:
    """Judge each output of a call, and return the judgment of the worst output.

    `expected` has the exact value and the allowed error of each output, or None for an output that
    is not judged. `output` is what the device returned. The worst output is the first output with
    the worst verdict. If all outputs pass, the worst output is the output with the largest ratio.
    """
    with trusted():
        judgments = [
            _judge(number, wanted, actual)
            for number, (wanted, actual) in enumerate(
                zip(expected, tree_leaves(output), strict=False)
            )
            if wanted is not None
        ]
    return max(
        judgments,
        key=lambda found: (found.verdict.severity, found.ratio if is_right(found) else 0.0),
    )


def _judge(number: int, expected: Expected, output: Any) -> Judgment:
    actual = expected.observe(torch.as_tensor(output).detach().cpu())
    exact, dtype = expected.exact, actual.dtype
    if actual.shape != exact.shape:
        return Judgment(Verdict.WRONG, math.inf, -math.inf, number)
    # An exact result that is too large for the dtype rounds to infinity. Then the device must
    # return infinity.
    rounded = exact.to(dtype)
    equal = (actual == rounded) | (actual.isnan() & rounded.isnan())
    if actual.numel() == 0 or (expected.scale is None and bool(equal.all())):
        return Judgment(Verdict.PASS, output=number)
    if expected.scale is None:
        worst = index_of_largest((~equal).int())
        verdict = Verdict.WRONG if expected.proves else Verdict.NOT_CHECKED
        return Judgment(verdict, math.inf, -math.inf, number, worst, must_equal=True)
    u = UNIT_ROUNDOFF[dtype]
    error = torch.where(equal & ~rounded.isfinite(), 0.0, (actual.double() - exact).abs())
    ratios = error_ratios(error, expected.scale, u, dtype)
    precision = ""
    if ratios.max() > expected.healthy and expected.typical is not None:
        typical = expected.typical()
        per_typical = expected.dominated / expected.healthy * typical.minimum(expected.scale)
        widened = error_ratios(error, expected.scale.maximum(per_typical), u, dtype)
        if widened.max() <= expected.healthy:
            ratios = widened
        else:
            precision = lower_precision(error, ratios, typical, expected.healthy, u)
    ratio = float(ratios.max())
    rms = u * float(ratios.square().mean().sqrt())
    bits = -math.log2(rms) if rms else math.inf
    verdict = verdict_of(ratio, expected.healthy, expected.wrong, precision)
    verdict = verdict if expected.proves or not verdict.is_bad else Verdict.NOT_CHECKED
    worst = index_of_largest(ratios)
    size = float(expected.scale.expand_as(ratios)[worst])
    unit = u * size + (smallest_kept(dtype) if size else 0.0)
    return Judgment(
        verdict, ratio, bits, number, worst, precision, healthy=expected.healthy, unit=unit
    )


def is_right(judgment: Judgment | None) -> bool:
    """Whether there is a judgment and its verdict is PASS."""
    return judgment is not None and judgment.verdict is Verdict.PASS
