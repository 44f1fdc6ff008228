"""How large a rounding error may be: every limit, and every scale G, of both accuracy checks.

An error is judged as the dimensionless ratio |device − exact| / (u G + η). `exact` is computed in
float64 from the device's own inputs. u is the unit roundoff of the dtype. G is the size of what the
operation adds up, elementwise. η is the dtype's underflow threshold. These are the test ratios of
BLAS's DMMCH and of LAPACK (Dongarra et al. 1990), with underflow as in Higham, Accuracy and
Stability of Numerical Algorithms, 2nd ed., §2.2, equation 2.8.

The check of activations and the check of operations both read this file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clean_transformer.parity.oracle import ACCUMULATOR, LOWER_PRECISION, smallest_kept
from clean_transformer.parity.verdict import SAME_FUNCTION, Verdict

# What a formula for G does to every factor of a product: `abs` gives Σ|xW|, `square` Σ(xW)².
Size = Callable[[Any], Any]


@dataclass(frozen=True)
class Kind:
    """A kind of operation, with the largest ratio that passes and the largest that may be rounding.

    A ratio of at most `healthy` is PASS. A ratio above `wrong` is WRONG: no order of rounding
    explains it. Between the two it is DEGRADED. Three fields refine this for sums:

    `wrong` is None where it is the number of terms k. A sum of k terms has an error of at most
    γ_k Σ|xW|, with γ_k = k u / (1 − k u) (Higham, §3.1).

    `healthy_per_root` is λ in the probabilistic bound λ √k u, for sums whose terms may all have one
    sign, such as an average: their errors grow like √k. A healthy error exceeds it with probability
    2 exp(−λ²/2) (Higham and Mary 2019, theorem 2.4), which is 3e-14 at λ = 8.

    `healthy_in_half` applies to sums in half precision. Kernels keep such sums in float32, so their
    length does not matter. A larger ratio means that the running total was in half precision too.
    """

    name: str
    healthy: float
    wrong: float | None
    healthy_per_root: float = 0.0
    healthy_in_half: float | None = None

    def limits(self, terms: int, u: float) -> tuple[float, float]:
        """The healthy and the wrong limit for a sum of that many terms with unit roundoff u."""
        if u > ACCUMULATOR:
            return self.healthy_in_half or self.healthy, self.wrong or self.healthy
        healthy = max(self.healthy, self.healthy_per_root * math.sqrt(terms))
        return healthy, max(healthy, float(terms)) if self.wrong is None else self.wrong


# The largest healthy ratio of sums in float32 and float64; in half precision, WRONG is above it.
HEALTHY_SUM = 30.0
# The largest healthy ratio of sums of halves, which kernels keep in float32.
HEALTHY_SUM_OF_HALVES = 8.0
# λ in the probabilistic bound λ √k u.
DEVIATIONS = 8.0
# Where no bound on the number of roundings is known, WRONG begins at this many healthy limits.
WRONG_FACTOR = 10.0

COPY = Kind("gather, copy, mask", 0.0, 0.0)
ADD = Kind("residual add", 1.0, 2.0)
ELEMENTWISE = Kind("elementwise", 8.0, 64.0)
GELU = Kind("gelu_new", 16.0, WRONG_FACTOR * 16.0)
LAYER_NORM = Kind("layer norm", HEALTHY_SUM, WRONG_FACTOR * HEALTHY_SUM)
LINEAR = Kind("linear", HEALTHY_SUM, None, healthy_in_half=HEALTHY_SUM_OF_HALVES)
SUM = Kind(
    "sum of terms of one sign",
    HEALTHY_SUM,
    None,
    healthy_per_root=DEVIATIONS,
    healthy_in_half=HEALTHY_SUM_OF_HALVES,
)
SOFTMAX = Kind("softmax", HEALTHY_SUM, None, healthy_per_root=DEVIATIONS)
ATTEND = Kind("attention", HEALTHY_SUM, None, healthy_per_root=DEVIATIONS)
OTHER = Kind("other", HEALTHY_SUM, WRONG_FACTOR * HEALTHY_SUM)
# A part of the model, by the error of its rows in units of what `parity/rounding.py` derives, where
# every operation is off by its whole u G. Single elements of a float32 operation are off by several
# u G (the README of the room has the largest that healthy runs show), and one element can be most
# of a row's error: GPT-2's residual stream has such elements. Half precision is summed in float32,
# so that only the results are rounded to it, each by at most u G.
PART = Kind("part as a whole", 8.0, WRONG_FACTOR * 8.0, healthy_in_half=3.0)

# The largest error of a stand-alone script's operation in float32, in units of u times a simpler G
# of the script's own numbers.
SCRIPT_HEALTHY = 100

# Independent roundings add up in quadrature. Their sum is seldom more than this many times its
# typical size, so a larger error does not come from a lower precision alone.
SELDOM_EXCEEDED = 8.0

# A drift, or the error of a black box: ρ = the device's error divided by the CPU's in the same
# dtype. Above WRONG_FACTOR times the healthy ρ, a black box is WRONG.
HEALTHY_RHO = {torch.float64: 2.0, torch.float32: 2.0, torch.bfloat16: 3.0, torch.float16: 3.0}
# Two healthy runs are apart by at most the sum of their errors.
HEALTHY_RUNS = 2


def rounding(dtype: torch.dtype) -> float:
    """The relative error that is healthy in that dtype, even where the CPU happens to have none.

    In float64 the oracle rounds as much as the device. There it is chosen so that a module that is
    not the same function is WRONG.
    """
    if dtype == torch.float64:
        return SAME_FUNCTION / (WRONG_FACTOR * HEALTHY_RHO[dtype])
    return torch.finfo(dtype).eps / 2


def verdict_of(ratio: float, healthy: float, wrong: float, precision: str = "") -> Verdict:
    """PASS, DEGRADED or WRONG; an error that a lower `precision` explains is DEGRADED at worst."""
    if ratio <= healthy:
        return Verdict.PASS
    return Verdict.WRONG if ratio > wrong and not precision else Verdict.DEGRADED


def lower_precision(
    error: Tensor, ratios: Tensor, typical: Tensor, healthy: float, u: float
) -> str:
    """The name of the precision that explains all errors of a product in float32, or "".

    Rounding to a lower precision moves nearly every element, and a faulty kernel only some. So the
    median ratio must be above `healthy`. No error may exceed SELDOM_EXCEEDED roundings of the
    `typical` size, which `typical_size` gives.
    """
    if u != ACCUMULATOR or float(ratios.median()) <= healthy:
        return ""
    relative = (error / (typical + smallest_kept(torch.float32))).nan_to_num(math.inf, math.inf)
    roundings = float(relative.max()) / SELDOM_EXCEEDED
    return next((name for lower, name in LOWER_PRECISION.items() if roundings <= lower), "")


def typical_size(exact: Tensor, squares: Tensor) -> Tensor:
    """|exact| + √Σ(xW)²: what independent roundings of a sum and of its terms are relative to."""
    return exact.abs() + squares.sqrt()


def error_ratios(error: Tensor, scale: Tensor, u: float, dtype: torch.dtype) -> Tensor:
    """|error| / (u G + η), elementwise, for a result of that dtype.

    Infinite where the error is not a number. Where G is 0 the exact result is 0 as well, and only
    that is right.
    """
    allowed = u * scale + torch.where(scale == 0, scale, smallest_kept(dtype))
    return torch.where(error == 0, 0.0, error / allowed).nan_to_num(math.inf, math.inf)


def index_of_largest(values: Tensor) -> tuple[int, ...]:
    """The index of the tensor's largest value."""
    return tuple(int(index) for index in torch.unravel_index(values.argmax(), values.shape))


def square(x: Any) -> Any:
    """x², for tensors and for Python numbers."""
    return x * x


def sum_scale(exact: Tensor, terms: Callable[[Size], Tensor], u: float) -> Tensor:
    """G of a sum of products, where `terms(size)` adds up the sizes of its terms.

    Σ|xW| in float32 and float64. In half precision the products are exact and are summed in
    float32, so only the result is rounded to half, once or a few times. Then G is
    |result| + √Σ(xW)² + (2⁻²⁴ / u) Σ|xW|. With Σ|xW| alone, a wrong sum of thousands of terms
    could pass.
    """
    absolute = terms(abs)
    if u <= ACCUMULATOR:
        return absolute
    finite = exact.abs().nan_to_num(posinf=0.0)  # masked scores are −∞
    return typical_size(finite, terms(square)) + ACCUMULATOR / u * absolute


def softmax_scale(pattern: Tensor, scores: Tensor, dim: int) -> Tensor:
    """p (1 + |s − max s|): the rounding of s − max s changes exp by that much, relatively.

    It is 0 where the pattern must be 0, and it also bounds the error of a row's sum.
    """
    below_highest = (scores - scores.amax(dim, keepdim=True)).abs()
    return torch.where(pattern == 0, 0.0, pattern * (1 + below_highest))


def layer_norm_scales(
    x: Tensor, eps: float, axes: tuple[int, ...] = (-1,)
) -> tuple[Tensor, Tensor, Tensor]:
    """G of LayerNorm's three parts: normalized x, mean, and σ = √(var + eps).

    Normalized: (|x| + mean|x|) / σ, the rounding of x − mean x divided by σ. Mean: mean|x|. With
    c = x − mean x, σ is off by δσ = mean(c δc) / σ, so that its G is
    mean(|c| (|x| + mean|x|) / σ) + σ.
    """
    mean_size = x.abs().mean(axes, keepdim=True)
    centered = x - x.mean(axes, keepdim=True)
    sigma = (centered.square().mean(axes, keepdim=True) + eps).sqrt()
    normalized = (x.abs() + mean_size) / sigma
    return normalized, mean_size, (centered.abs() * normalized).mean(axes, keepdim=True) + sigma


def gelu_scale(x: Tensor, approximate: str = "tanh") -> Tensor:
    """½|x| (1 + |tanh(…)|), or with erf for the exact form."""
    if approximate == "tanh":
        inner = (math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))).tanh()
    else:
        inner = (x / math.sqrt(2)).erf()
    return x.abs() / 2 * (1 + inner.abs())


def attention_terms(pattern: Tensor, scores: Tensor, v: Tensor, size: Size) -> Tensor:
    """What fused attention adds up, for `sum_scale`; `scores` is S = |q||k| scale + |mask|.

    Σⱼ pⱼ|vⱼ| (1 + Sⱼ + Σₗ pₗSₗ): a score is off by u S, and δp = p (δs − Σₗ pₗ δsₗ) to first order,
    so that |δpⱼ| ≤ u pⱼ (Sⱼ + Σₗ pₗSₗ), beside pⱼ's own rounding. A half-precision kernel keeps the
    scores in float32 and rounds p and the result: Σ(pⱼvⱼ)².
    """
    if size is square:
        return square(pattern) @ square(v)
    spread = 1 + scores + (pattern * scores).sum(-1, keepdim=True)
    return (pattern * spread) @ v.abs()


def attention_squares(pattern: Tensor, scores: Tensor, v: Tensor) -> Tensor:
    """Σ(pⱼvⱼ(1 + |sⱼ|))², for `typical_size` of fused attention: p is off by |s| u as well."""
    return square(pattern * (1 + scores.abs())) @ square(v)
