"""How large a rounding error may be, for each kind of operation.

Activations (`activations/`) and ATen operations (`operations/`) are checked with these limits. The
limits apply to the error ratio |device − exact| / (u G + η), the error in units of about one
rounding error:

- `exact` is the result computed in float64 from the device's own inputs.
- u is the unit roundoff of the dtype: the largest relative error of one rounding.
- G says, for each element of the result, how large the numbers are that the operation rounds. For a
  matrix product, G is Σ|xW|, the sum of the absolute values of the terms. `parity/scales.py` has
  the formulas.
- η is the underflow threshold of the dtype: devices may flush smaller numbers to 0.

The test programs of BLAS and LAPACK use this ratio too (Dongarra et al. 1990). The underflow term
is from Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., §2.2, equation 2.8.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.parity.oracle import (
    ACCUMULATOR,
    LOWER_PRECISION,
    UNIT_ROUNDOFF,
    smallest_kept,
)
from clean_transformer.parity.verdict import SAME_FUNCTION, Verdict


@dataclass(frozen=True)
class Kind:
    """A kind of operation, and the limits of its error ratio (see the top of this file).

    The verdict is PASS for a ratio of at most `healthy`. It is WRONG for a ratio above `wrong`,
    because rounding cannot explain the error. It is DEGRADED between these limits. For sums of k
    terms, the limits depend on k and on the dtype:

    If `wrong` is None, the limit above which the verdict is WRONG is k, or the healthy limit if
    that is larger. The reason is that a sum of k terms has an error of at most γ_k Σ|xW|, with
    γ_k = k u / (1 − k u) (Higham, §3.1). In half precision (bfloat16 or float16), the verdict is
    then WRONG above the healthy limit.

    `healthy_per_root` is λ in the probabilistic bound λ √k u. In float32 and float64, the healthy
    limit is the maximum of `healthy` and λ √k. Kinds of sums whose terms may all have the same
    sign, such as averages, need a λ above 0, because their errors grow like √k. A healthy error
    exceeds the bound with probability 2 exp(−λ²/2) (Higham and Mary 2019, theorem 2.4), which is
    3e-14 for λ = 8.

    `healthy_in_half` is the healthy limit in half precision; None means `healthy`. Kernels
    accumulate half-precision sums in float32, so this limit does not depend on the number of terms.
    A larger ratio means that a kernel accumulated in half precision.
    """

    name: str
    healthy: float
    wrong: float | None
    healthy_per_root: float = 0.0
    healthy_in_half: float | None = None

    def limits(self, terms: int, u: float) -> tuple[float, float]:
        """Return the limits (healthy, wrong) for a sum of `terms` terms with unit roundoff `u`."""
        if u > ACCUMULATOR:
            healthy = self.healthy_in_half or self.healthy
            return healthy, self.wrong * healthy / self.healthy if self.wrong else self.healthy
        healthy = max(self.healthy, self.healthy_per_root * math.sqrt(terms))
        return healthy, max(healthy, float(terms)) if self.wrong is None else self.wrong

    def dominated(self, terms: int, u: float) -> float:
        """Return 8 √k for k = `terms`, or 0 in half precision.

        This is a second limit for sums in which a few large terms make up most of Σ|xW|, as in the
        gradient of a loss with respect to the logits. An error above the limit `healthy` still
        passes if it is at most 8 √k u (|result| + √Σ(xW)²).
        """
        # Nearly every partial sum is about as large as the largest terms. So each of the k
        # additions makes a rounding error of similar size, and the errors grow like √k. In half
        # precision, kernels accumulate such sums in float32.
        return 0.0 if u > ACCUMULATOR else DEVIATIONS * math.sqrt(terms)


# The largest healthy ratio of sums in float32 and float64. In half precision, a sum with a larger
# ratio is WRONG.
HEALTHY_SUM = 30.0
# The largest healthy ratio of sums in half precision, which kernels accumulate in float32.
HEALTHY_SUM_OF_HALVES = 8.0
# λ in the probabilistic bound λ √k u (see `Kind.healthy_per_root`).
DEVIATIONS = 8.0
# For operations whose rounding error has no known upper bound, `wrong` is this factor times
# `healthy`.
WRONG_FACTOR = 10.0

COPY = Kind("gather, copy, mask", 0.0, 0.0)
ADD = Kind("residual add", 1.0, 2.0)
ELEMENTWISE = Kind("elementwise", 8.0, 64.0)
GELU = Kind("gelu_new", 16.0, WRONG_FACTOR * 16.0)
LAYER_NORM = Kind("layer norm", HEALTHY_SUM, WRONG_FACTOR * HEALTHY_SUM)
# Batch, instance and group norm take means of many numbers, so their errors can grow like √k.
NORM = Kind("norm", HEALTHY_SUM, None, healthy_per_root=DEVIATIONS)
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
# Kernels may use fast algorithms such as Winograd's, which also round sums of inputs and weights.
CONVOLUTION = Kind("convolution", HEALTHY_SUM, WRONG_FACTOR * HEALTHY_SUM)
OTHER = Kind("other", HEALTHY_SUM, WRONG_FACTOR * HEALTHY_SUM)
# A whole block (see `parity/uses/judge.py`). Its ratio is the root mean square error of one row
# [d_model], divided by the error that random rounding causes in this row (`parity/rounding.py`).
# The limits are derived: the square of the device's error has the mean ρ² or less, in units of
# random rounding, with ρ = 0.64 in float32 and 0.58 in half precision (see HEALTHY_RHO). In GPT-2's
# residual stream, three large elements cause most of a row's error. So its square is distributed
# like ρ² χ²/3, with 3 degrees of freedom. At least half of the unit's square is typical for a row
# of its size (`uses/rows.py`), so a ratio above x has the probability P(χ² > 3 x² / (2 ρ²)). This
# is 1e-12 for x = 4 in float32, and 1e-8 for x = 3 in half precision. `README.md` lists the
# measured ratios, and `wrong` is chosen.
PART = Kind("part as a whole", 4.0, WRONG_FACTOR * 4.0, healthy_in_half=3.0)
# The gradient of a block's input or of one of its parameters, judged row by row like PART. One
# number can cause nearly the whole error of a row: in a gradient Σ x g, an error of one large x
# changes a whole row, and x is a sum of many terms. The error of a healthy sum in float32 is up to
# HEALTHY_SUM in units of random rounding, so the ratio of the row is, too. Kernels accumulate
# half-precision sums in float32, so there the limit is that of PART.
GRADIENT = Kind(
    "gradient", HEALTHY_SUM, WRONG_FACTOR * HEALTHY_SUM, healthy_in_half=PART.healthy_in_half
)
# A module whose output is all that can be watched (see `activations/black_box.py`), such as a
# LayerNorm. Errors of LayerNorm's mean and σ are shared by all elements of a row. Random rounding
# moves each element on its own, so the ratio of a healthy row can be 2. The limit for float32 is
# chosen, not derived.
ALONE = Kind("black box", 8.0, WRONG_FACTOR * 8.0, healthy_in_half=3.0)

# Independent rounding errors add up like the root of a sum of squares. Their total is seldom more
# than this factor times u × `typical_size` (in `scales.py`). `lower_precision` inserts the u of a
# lower precision: an error above the product was not caused by this precision.
SELDOM_EXCEEDED = 8.0

# The largest healthy ρ, by dtype. ρ is the device's error divided by the error of random rounding,
# which moves each result by a normal random number times u G. Drift (`activations/drift.py`) is
# judged by ρ. A result that is rounded once has a root mean square error of at most u G / √3, which
# is ρ = 0.58. Half-precision kernels sum in float32 and round once. In float32, k terms of random
# sign that are added in order have an error of about σ u k / √6. Their G is k times the mean
# magnitude of a term, which is 0.64 σ for products of normal numbers. That is ρ = 0.64. In float64,
# the oracle rounds as much as the device. The largest measured ρ is 0.56 (`parity/README.md`).
HEALTHY_RHO = {torch.float64: 2.0, torch.float32: 1.5, torch.bfloat16: 1.0, torch.float16: 1.0}
# The largest healthy difference of two runs, in units of the error of random rounding. Two healthy
# runs differ by at most the sum of their errors. In half precision, each error is at most that of
# results that are rounded once, which is ρ = 1/√3 = 0.58, because the sums are in float32.
HEALTHY_DIFFERENCE = {
    torch.float64: 2 * HEALTHY_RHO[torch.float64],
    torch.float32: 2 * HEALTHY_RHO[torch.float32],
    torch.bfloat16: 2 / math.sqrt(3),
    torch.float16: 2 / math.sqrt(3),
}
# About the number of operations in a block that are no sums; see `largest_drift`.
STEPS = 40


def largest_drift(cfg: Config, dtype: torch.dtype) -> float:
    """Return the largest relative error that rounding can cause in the logits.

    This assumes that no large terms cancel in a sum. Each of n roundings multiplies a result by a
    factor 1 + δ with |δ| ≤ u. Together they change the result by at most γ_n ≈ n u (Higham, lemma
    3.1). n is the number of roundings on the longest way from the embeddings to a logit.
    """
    # A sum of k terms counts as k roundings, and STEPS is the number of the other operations in a
    # block. Sums are rounded as in float32, also in half precision.
    lengths = 6 * cfg.d_model + cfg.d_head + 2 * cfg.n_ctx + cfg.n_heads * cfg.d_head + cfg.d_mlp
    u = UNIT_ROUNDOFF[dtype]
    return (cfg.n_layers + 1) * (STEPS * u + lengths * min(u, ACCUMULATOR))


def rounding(dtype: torch.dtype) -> float:
    """Return a relative error that is healthy for every result in this dtype.

    It is the unit roundoff, except in float64. The results that count as exact are computed in
    float64, too, and have the same rounding errors. So the value for float64 is larger:
    SAME_FUNCTION / (WRONG_FACTOR × HEALTHY_RHO).
    """
    if dtype == torch.float64:
        return SAME_FUNCTION / (WRONG_FACTOR * HEALTHY_RHO[dtype])
    return torch.finfo(dtype).eps / 2


def verdict_of(ratio: float, healthy: float, wrong: float, precision: str = "") -> Verdict:
    """Return the verdict for an error ratio: PASS, DEGRADED or WRONG.

    The verdict is PASS up to the limit `healthy`, WRONG above the limit `wrong`, and DEGRADED
    between. If `precision` names a lower precision that explains the error, the verdict is never
    WRONG.
    """
    if ratio <= healthy:
        return Verdict.PASS
    return Verdict.WRONG if ratio > wrong and not precision else Verdict.DEGRADED


def lower_precision(
    error: Tensor, ratios: Tensor, typical: Tensor, healthy: float, u: float
) -> str:
    """Return the lower precision that explains all errors of a float32 product.

    The result is "TF32", "bfloat16", or "" if no precision fits or if `u` is not that of float32.
    `error`, `ratios` and `typical` have the shape of the product. A typical error of an element is
    the unit roundoff times `typical`. A lower precision explains the errors if two conditions hold.
    First, the median ratio is above `healthy`: a lower precision changes nearly all elements, while
    a faulty kernel changes only some. Second, no error is larger than
    SELDOM_EXCEEDED × the lower precision's unit roundoff × `typical`.
    """
    if u != ACCUMULATOR or float(ratios.median()) <= healthy:
        return ""
    relative = (error / (typical + smallest_kept(torch.float32))).nan_to_num(math.inf, math.inf)
    roundings = float(relative.max()) / SELDOM_EXCEEDED
    return next((name for lower, name in LOWER_PRECISION.items() if roundings <= lower), "")


def error_ratios(error: Tensor, scale: Tensor, u: float, dtype: torch.dtype) -> Tensor:
    """Return the error ratio error / (u G + η) of each element of a result of the given dtype.

    `error` is |device − exact|, `scale` is G, and η is the underflow threshold. The ratio is
    infinite where the error is NaN. Where G is 0, the exact result is 0. There η is left out, so
    that any error has an infinite ratio.
    """
    # Attention scores of long texts are large, so rare numbers are replaced only if there are some.
    allowed = torch.add(scale.new_tensor(smallest_kept(dtype)), scale, alpha=u)
    if not bool(scale.all()):
        allowed.masked_fill_(scale == 0, 0.0)
    ratios = error / allowed
    if not bool(ratios.sum().isfinite()):
        ratios.masked_fill_(error == 0, 0.0).nan_to_num_(math.inf, math.inf)
    return ratios


def index_of_largest(values: Tensor) -> tuple[int, ...]:
    """The index of the tensor's largest value."""
    if values.ndim > 1:  # `amax` is several times faster than `argmax`, so search one row only
        row = index_of_largest(values.amax(dim=-1))
        return (*row, *index_of_largest(values[row]))
    return tuple(int(index) for index in torch.unravel_index(values.argmax(), values.shape))
