"""Formulas for G: how large the numbers are that an operation rounds.

An error ratio is |device − exact| / (u G + η) (see `parity/limits.py`). The formula for G depends
on the operation. `parity/README.md` has the derivations.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clean_transformer.parity.oracle import ACCUMULATOR

# A function that is applied to every factor of a product before the products are summed. `abs`
# turns Σ xW into Σ|xW|. `square` turns Σ xW into Σ(xW)².
Size = Callable[[Any], Any]


def square(x: Any) -> Any:
    """x², for tensors and for Python numbers."""
    return x * x


def typical_size(exact: Tensor, squares: Tensor) -> Tensor:
    """Return |exact| + √Σ(xW)² for a sum of products Σ xW; `squares` is Σ(xW)².

    If the sum and its terms are rounded independently, a typical error is u times this value.
    """
    return exact.abs() + squares.sqrt()


def sum_scale(exact: Tensor, terms: Callable[[Size], Tensor], u: float) -> Tensor:
    """Return the G of a sum of products Σ xW. The allowed error is proportional to G.

    `terms(abs)` is Σ|xW|, and `terms(square)` is Σ(xW)². In float32 and float64, G is Σ|xW|. In
    half precision, G is |result| + √Σ(xW)² + (2⁻²⁴ / u) Σ|xW|, which is smaller than Σ|xW| if there
    are many terms. This is large enough: kernels compute half-precision products exactly, sum them
    in float32, and round only the result to half precision, once or a few times. With G = Σ|xW|, a
    wrong sum of thousands of terms could pass.
    """
    absolute = terms(abs)
    if u <= ACCUMULATOR:
        return absolute
    finite = exact.abs().nan_to_num(posinf=0.0)  # masked scores are −∞
    return typical_size(finite, terms(square)) + ACCUMULATOR / u * absolute


def softmax_scale(pattern: Tensor, scores: Tensor, dim: int) -> Tensor:
    """Return the G of softmax: p (1 + |s − max s|), for scores s and pattern p.

    The allowed error is proportional to G. G is 0 where the pattern must be 0.
    """
    # Rounding s − max s changes exp(s − max s) by the relative error u |s − max s|. The same factor
    # bounds the error of the sum along `dim`.
    below_highest = (scores - scores.amax(dim, keepdim=True)).abs()
    return torch.where(pattern == 0, 0.0, pattern * (1 + below_highest))


def layer_norm_scales(
    x: Tensor, eps: float, axes: tuple[int, ...] = (-1,)
) -> tuple[Tensor, Tensor, Tensor]:
    """Return G for three results of LayerNorm: the normalized x, the mean, and σ = √(var + eps).

    The allowed error of a result is proportional to its G. The normalized x has G = (|x| + mean|x|)
    / σ, the mean has G = mean|x|, and σ has G = mean(|c| (|x| + mean|x|) / σ) + σ, where c = x −
    mean x.
    """
    # Rounding x − mean x causes an error of u (|x| + mean|x|), which is then divided by σ. With
    # c = x − mean x, an error δc changes σ by δσ = mean(c δc) / σ.
    mean_size = x.abs().mean(axes, keepdim=True)
    centered = x - x.mean(axes, keepdim=True)
    sigma = (centered.square().mean(axes, keepdim=True) + eps).sqrt()
    normalized = (x.abs() + mean_size) / sigma
    return normalized, mean_size, (centered.abs() * normalized).mean(axes, keepdim=True) + sigma


def gelu_scale(x: Tensor, approximate: str = "tanh") -> Tensor:
    """Return the G of GELU: ½|x| (1 + |tanh(…)|), or ½|x| (1 + |erf(…)|) for the erf form.

    The allowed error is proportional to G.
    """
    if approximate == "tanh":
        # In place, because x is large and new memory is slow.
        inner = x.pow(3).mul_(0.044715).add_(x).mul_(math.sqrt(2 / math.pi)).tanh_()
    else:
        inner = (x / math.sqrt(2)).erf_()
    return inner.abs_().add_(1).mul_(x.abs()).div_(2)


def attention_terms(pattern: Tensor, scores: Tensor, v: Tensor, size: Size) -> Tensor:
    """Return Σ|pv|, enlarged for the rounding of the scores, or Σ(pv)², for fused attention.

    `size` is `abs` or `square`. `pattern` is the attention pattern p. `scores` has a bound S on the
    absolute value of each score: |q||k| scale + |mask|. For `abs`, the result is Σⱼ pⱼ|vⱼ| (1 + Sⱼ
    + Σₗ pₗSₗ). For `square`, the result is Σ(pⱼvⱼ)².
    """
    # Only half precision needs the squares. A half-precision kernel keeps the scores in float32,
    # and rounds only p and the result.
    if size is square:
        return square(pattern) @ square(v)
    # The 1 stands for the rounding of pⱼ, and the other terms for the rounding of the scores. A
    # score has an error of u S, and to first order δp = p (δs − Σₗ pₗ δsₗ), so that
    # |δpⱼ| ≤ u pⱼ (Sⱼ + Σₗ pₗSₗ).
    weighted = pattern * scores
    return weighted @ v.abs() + (1 + weighted.sum(-1, keepdim=True)) * (pattern @ v.abs())


def attention_squares(pattern: Tensor, scores: Tensor, v: Tensor) -> Tensor:
    """Return Σ(pⱼvⱼ(1 + |sⱼ|))², from which follows the typical rounding error of attention.

    `pattern` is p, and `scores` has the signed scores s. The factor 1 + |sⱼ| is there because
    rounding sⱼ changes pⱼ by a relative error of up to u |sⱼ|, where u is the unit roundoff.
    """
    return square(pattern * (1 + scores.abs())) @ square(v)
