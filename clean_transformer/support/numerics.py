"""Conversions to a higher precision, so that a computation loses nothing to rounding."""

import torch
from jaxtyping import Float
from torch import Tensor


def upcast(value: Tensor) -> Tensor:
    """Return `value` in float64, the oracle's dtype. Integers, such as token ids, stay integers."""
    return value.double() if value.is_floating_point() else value


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `x` in float32 if it is in half precision; float32 and float64 stay as they are.

    Sums over many terms need it: a variance over d_model, a softmax over 50,257 tokens.
    """
    return x.to(float32_or_more(x.dtype))


def float32_or_more(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of `at_least_float32` of a tensor of this dtype."""
    return torch.promote_types(dtype, torch.float32)
