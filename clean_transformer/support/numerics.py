"""TODO support/numerics."""

import torch
from jaxtyping import Float
from torch import Tensor


def upcast(value: Tensor) -> Tensor:
    """The same numbers in float64; token ids stay as they are."""
    return value.double() if value.is_floating_point() else value


def at_least_float32(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half precision as float32: a softmax over 50,257 tokens needs it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
