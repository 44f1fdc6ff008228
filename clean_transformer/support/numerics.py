"""Conversions to dtypes of higher precision, which keep rounding errors small."""

import torch
from jaxtyping import Float
from torch import Tensor


def upcast(value: Tensor) -> Tensor:
    """Return `value` in float64 if `value` has a float dtype.

    Other tensors, such as token ids, are returned unchanged.
    """
    return value.double() if value.is_floating_point() else value


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `x` in float32 if `x` is bfloat16 or float16, and `x` itself otherwise.

    Sums over many terms need at least the precision of float32. Examples are a variance over
    d_model activations, and a softmax over 50,257 logits.
    """
    return x.to(float32_or_more(x.dtype))


def float32_or_more(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for bfloat16 and float16, and `dtype` itself for float32 and float64."""
    return torch.promote_types(dtype, torch.float32)
