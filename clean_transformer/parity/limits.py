"""How large a rounding error may be: the limits and scales G of both accuracy checks.

The checks judge an error by the dimensionless ratio |device − exact| / (u G + η):

- `exact` is the result computed in float64 from the device's own inputs.
- u is the unit roundoff of the dtype.
- G is, for each element of the result, the size of the terms that the operation adds up, such as
  Σ|xW| for a matrix product.
- η is the underflow threshold of the dtype.

BLAS's DMMCH and LAPACK test with the same ratio (Dongarra et al. 1990). The underflow term follows
Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., §2.2, equation 2.8.

The check of activations and the check of ATen operations both use these limits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clean_transformer.parity.oracle import ACCUMULATOR, LOWER_PRECISION, smallest_kept
from clean_transformer.parity.verdict import SAME_FUNCTION, Verdict

# A function that is applied to every factor of a product before the products are summed. `abs`
# turns Σ xW into Σ|xW|, `square` turns it into Σ(xW)².
Size = Callable[[Any], Any]


@dataclass(frozen=True)
class Kind:
    """A kind of operation and the limits of its error ratio.

    A ratio of at most `healthy` is PASS. A ratio above `wrong` is WRONG, because rounding cannot
    explain it. A ratio between these limits is DEGRADED. For sums, three fields have more rules:

    `wrong`: None means that the limit is the number of terms k. A sum of k terms has an error of at
    most γ_k Σ|xW|, with γ_k = k u / (1 − k u) (Higham, §3.1).

    `healthy_per_root`: λ in the probabilistic bound λ √k u. It is used for sums whose terms may all
    have the same sign, such as an average, because their errors grow like √k. A healthy error
    exceeds this bound with probability 2 exp(−λ²/2) (Higham and Mary 2019, theorem 2.4), which is
    3e-14 for λ = 8.

    `healthy_in_half`: the healthy limit of sums in half precision (bfloat16 or float16). Kernels
    accumulate such sums in float32, so the limit does not depend on the number of terms. A larger
    ratio means that a kernel accumulated in half precision.
    """

    name: str
    healthy: float
    wrong: float | None
    healthy_per_root: float = 0.0
    healthy_in_half: float | None = None

    def limits(self, terms: int, u: float) -> tuple[float, float]:
        """The limits (`healthy`, `wrong`) for a sum of `terms` terms with unit roundoff `u`."""
        if u > ACCUMULATOR:
            return self.healthy_in_half or self.healthy, self.wrong or self.healthy
        healthy = max(self.healthy, self.healthy_per_root * math.sqrt(terms))
        return healthy, max(healthy, float(terms)) if self.wrong is None else self.wrong


# The largest healthy ratio of sums in float32 and float64. In half precision, it is the limit above
# which a sum is WRONG.
HEALTHY_SUM = 30.0
# The largest healthy ratio of sums in half precision, which kernels accumulate in float32.
HEALTHY_SUM_OF_HALVES = 8.0
# λ in the probabilistic bound λ √k u.
DEVIATIONS = 8.0
# If no bound on the number of roundings is known, `wrong` is this factor times `healthy`.
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

# The largest float32 error that a reproduction script accepts, in units of u G. The script computes
# G with a simpler formula than the formulas below.
SCRIPT_HEALTHY = 100

# Independent rounding errors add up like the root of a sum of squares. The total is seldom more
# than this factor times its typical size. A larger error has another cause than a lower precision.
SELDOM_EXCEEDED = 8.0

# The largest healthy ρ, by dtype. ρ is the device's error divided by the CPU's error in the same
# dtype; it judges drift and black boxes. A black box with a ρ above WRONG_FACTOR times this limit
# is WRONG.
HEALTHY_RHO = {torch.float64: 2.0, torch.float32: 2.0, torch.bfloat16: 3.0, torch.float16: 3.0}
# Two healthy runs differ by at most the sum of their errors, so by twice the largest error.
HEALTHY_RUNS = 2


def rounding(dtype: torch.dtype) -> float:
    """The relative error that is always healthy in this dtype, even if the CPU has no error.

    The result is the unit roundoff, except in float64. There the oracle rounds as much as the
    device, so the result is chosen such that an error above SAME_FUNCTION is WRONG.
    """
    if dtype == torch.float64:
        return SAME_FUNCTION / (WRONG_FACTOR * HEALTHY_RHO[dtype])
    return torch.finfo(dtype).eps / 2


def verdict_of(ratio: float, healthy: float, wrong: float, precision: str = "") -> Verdict:
    """The verdict for an error ratio: PASS, DEGRADED or WRONG.

    If `precision` names a lower precision that explains the error, the verdict is never WRONG.
    """
    if ratio <= healthy:
        return Verdict.PASS
    return Verdict.WRONG if ratio > wrong and not precision else Verdict.DEGRADED


def lower_precision(
    error: Tensor, ratios: Tensor, typical: Tensor, healthy: float, u: float
) -> str:
    """The lower precision that explains all errors of a float32 product: "TF32", "bfloat16" or "".

    `error`, `ratios` and `typical` have the shape of the product; `typical` comes from
    `typical_size`. Two conditions must hold. The median ratio must be above `healthy`: a lower
    precision changes nearly all elements, while a faulty kernel changes only some. And no error may
    be larger than SELDOM_EXCEEDED × the precision's unit roundoff × `typical`.
    """
    if u != ACCUMULATOR or float(ratios.median()) <= healthy:
        return ""
    relative = (error / (typical + smallest_kept(torch.float32))).nan_to_num(math.inf, math.inf)
    roundings = float(relative.max()) / SELDOM_EXCEEDED
    return next((name for lower, name in LOWER_PRECISION.items() if roundings <= lower), "")


def typical_size(exact: Tensor, squares: Tensor) -> Tensor:
    """|exact| + √Σ(xW)², the scale of the error if a sum and its terms are rounded independently.

    `squares` is Σ(xW)².
    """
    return exact.abs() + squares.sqrt()


def error_ratios(error: Tensor, scale: Tensor, u: float, dtype: torch.dtype) -> Tensor:
    """|error| / (u G + η) for each element of a result of the given dtype; `scale` is G.

    The ratio is infinite where the error is NaN. Where G is 0, the exact result is 0, and any
    error there has an infinite ratio.
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
    """G of a sum of products Σ xW. `terms(abs)` returns Σ|xW|, and `terms(square)` Σ(xW)².

    In float32 and float64, G is Σ|xW|. In half precision, G is
    |result| + √Σ(xW)² + (2⁻²⁴ / u) Σ|xW|. There the products are exact and are summed in float32,
    and only the result is rounded to half precision, once or a few times. With G = Σ|xW|, a wrong
    sum of thousands of terms could pass.
    """
    absolute = terms(abs)
    if u <= ACCUMULATOR:
        return absolute
    finite = exact.abs().nan_to_num(posinf=0.0)  # masked scores are −∞
    return typical_size(finite, terms(square)) + ACCUMULATOR / u * absolute


def softmax_scale(pattern: Tensor, scores: Tensor, dim: int) -> Tensor:
    """G of softmax: p (1 + |s − max s|), for the scores s and the pattern p.

    A rounding of s − max s changes exp(s − max s) by the relative error u |s − max s|. The same
    factor bounds the error of the sum over a row. G is 0 where the pattern must be 0.
    """
    below_highest = (scores - scores.amax(dim, keepdim=True)).abs()
    return torch.where(pattern == 0, 0.0, pattern * (1 + below_highest))


def layer_norm_scales(
    x: Tensor, eps: float, axes: tuple[int, ...] = (-1,)
) -> tuple[Tensor, Tensor, Tensor]:
    """G of the normalized x, of the mean, and of σ = √(var + eps) in LayerNorm, in this order.

    The normalized x has G = (|x| + mean|x|) / σ, which is the rounding of x − mean x, divided by σ.
    The mean has G = mean|x|. Let c = x − mean x. An error δc changes σ by δσ = mean(c δc) / σ, so σ
    has G = mean(|c| (|x| + mean|x|) / σ) + σ.
    """
    mean_size = x.abs().mean(axes, keepdim=True)
    centered = x - x.mean(axes, keepdim=True)
    sigma = (centered.square().mean(axes, keepdim=True) + eps).sqrt()
    normalized = (x.abs() + mean_size) / sigma
    return normalized, mean_size, (centered.abs() * normalized).mean(axes, keepdim=True) + sigma


def gelu_scale(x: Tensor, approximate: str = "tanh") -> Tensor:
    """G of GELU: ½|x| (1 + |tanh(…)|) for the tanh form, ½|x| (1 + |erf(…)|) for the exact form."""
    if approximate == "tanh":
        inner = (math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))).tanh()
    else:
        inner = (x / math.sqrt(2)).erf()
    return x.abs() / 2 * (1 + inner.abs())


def attention_terms(pattern: Tensor, scores: Tensor, v: Tensor, size: Size) -> Tensor:
    """The sums over the terms of fused attention that `sum_scale` needs.

    `scores` is S = |q||k| scale + |mask|, p is the pattern. For `abs`, the sum is
    Σⱼ pⱼ|vⱼ| (1 + Sⱼ + Σₗ pₗSₗ). Here 1 stands for the rounding of pⱼ. The rest comes from the
    scores: a score has an error of u S, and to first order δp = p (δs − Σₗ pₗ δsₗ), so that
    |δpⱼ| ≤ u pⱼ (Sⱼ + Σₗ pₗSₗ). For `square`, the sum is Σ(pⱼvⱼ)², because a half-precision kernel
    keeps the scores in float32, and rounds only p and the result.
    """
    if size is square:
        return square(pattern) @ square(v)
    spread = 1 + scores + (pattern * scores).sum(-1, keepdim=True)
    return (pattern * spread) @ v.abs()


def attention_squares(pattern: Tensor, scores: Tensor, v: Tensor) -> Tensor:
    """Σ(pⱼvⱼ(1 + |sⱼ|))², the `squares` that `typical_size` takes for fused attention.

    The factor 1 + |sⱼ| is there because a rounded score sⱼ changes pⱼ by the relative error u |sⱼ|.
    """
    return square(pattern * (1 + scores.abs())) @ square(v)
