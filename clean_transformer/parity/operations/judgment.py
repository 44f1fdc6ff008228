"""TODO parity/operations/judgment."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clean_transformer.parity.operations.call import Operand
from clean_transformer.parity.operations.replay import Expected
from clean_transformer.parity.oracle import LOWER_PRECISION, UNIT_ROUNDOFF, smallest_kept, trusted
from clean_transformer.parity.verdict import Verdict


@dataclass(frozen=True)
class Judgment:
    """One call's outputs beside the exact ones.

    `ratio` is the largest |device - exact| / (u G + η), infinite where the device's number is not
    one or where equality was due; `output` and `worst` say where. `bits` is the effective
    precision -log₂ RMS(|device - exact| / G). `precision` names the lower precision that alone
    explains the error; `must_equal` says that no error was allowed.
    """

    verdict: Verdict
    ratio: float = 0.0
    bits: float = math.inf
    output: int = 0
    worst: tuple[int, ...] = ()
    precision: str = ""
    must_equal: bool = False


def judge(expected: list[Expected | None], output: Any) -> Judgment:
    """The first output's of the worst verdict or, where all are right, the largest ratio's."""
    with trusted():
        judgments = [
            _judge(number, wanted, actual)
            for number, (wanted, actual) in enumerate(
                zip(expected, tree_leaves(output), strict=False)
            )
            if wanted is not None
        ]
    ranks = [*Verdict]
    return max(
        judgments,
        key=lambda found: (ranks.index(found.verdict), found.ratio if _right(found) else 0.0),
    )


def _judge(number: int, expected: Expected, output: Any) -> Judgment:
    actual = expected.observe(torch.as_tensor(output).detach().cpu())
    exact, dtype = expected.exact, actual.dtype
    if actual.shape != exact.shape:
        return Judgment(Verdict.WRONG, math.inf, -math.inf, number)
    # Rounded, an exact result may be infinite in the dtype: then infinity is right.
    rounded = exact.to(dtype)
    equal = (actual == rounded) | (actual.isnan() & rounded.isnan())
    if actual.numel() == 0 or (expected.scale is None and bool(equal.all())):
        return Judgment(Verdict.PASS, output=number)
    if expected.scale is None:
        worst = _where_largest(~equal)
        return Judgment(Verdict.WRONG, math.inf, -math.inf, number, worst, must_equal=True)
    u, underflow = UNIT_ROUNDOFF[dtype], smallest_kept(dtype)
    error = torch.where(equal & ~rounded.isfinite(), 0.0, (actual.double() - exact).abs())
    # Where G is 0, so is the exact result: of zeros, of a masked score.
    allowed = u * expected.scale + torch.where(expected.scale == 0, 0.0, underflow)
    ratios = torch.where(error == 0, 0.0, error / allowed).nan_to_num(math.inf, math.inf)
    ratio = float(ratios.max())
    rms = u * float(ratios.square().mean().sqrt())
    bits = -math.log2(rms) if rms else math.inf
    precision = _explained_by(error, expected) if dtype == torch.float32 else ""
    if ratio <= expected.healthy:
        verdict = Verdict.PASS
    else:
        wrong = ratio > expected.wrong and not precision
        verdict = Verdict.WRONG if wrong else Verdict.DEGRADED
    precision = precision if verdict is Verdict.DEGRADED else ""
    return Judgment(verdict, ratio, bits, number, _where_largest(ratios), precision)


def _explained_by(error: Tensor, expected: Expected) -> str:
    # Independent roundings add in quadrature and seldom reach eight times that.
    if expected.typical is None:
        return ""
    relative = (error / (expected.typical + 2.0**-126)).nan_to_num(math.inf, math.inf).max()
    return next((name for u, name in LOWER_PRECISION.items() if relative <= 8 * u), "")


def _where_largest(values: Tensor) -> tuple[int, ...]:
    place = int(values.double().argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(place), values.shape))


def _right(judgment: Judgment | None) -> bool:
    return judgment is not None and judgment.verdict is Verdict.PASS


def _contiguous(layout: Operand) -> Operand:
    stride = torch.empty(layout.shape, device="meta").stride()
    return Operand(layout.shape, stride, 0, layout.dtype, layout.device)


def _range(values: Tensor) -> tuple[float, float]:
    finite = values[values.isfinite()]
    return (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
