"""Draws the random tensors of the probes: the checks of single operations."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from clean_transformer.parity.oracle import trusted

# The possible contents of a probe's tensor. TRUTH has booleans and IDS has token ids from 0 to 49.
# All others are made from normally distributed numbers. NORMAL has these numbers, and WEIGHTS has 0
# in place of the negative numbers. LARGE has numbers of about 10⁴, and SCORES of about 10³. EQUAL
# has many equal numbers, and a row in which all numbers are equal. MASKED has −∞ in the upper
# triangle, but not in the last row. SMALL has numbers of about 10⁻¹³. SUBNORMAL has numbers below
# the smallest normal number of the dtype.
NORMAL, WEIGHTS, TRUTH, IDS = "normal", "weights", "truth", "ids"
LARGE, SCORES, EQUAL, MASKED = "large", "scores", "equal", "masked"
SMALL, SUBNORMAL = "small", "subnormal"


def draw(
    content: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Return a random tensor with the given content, such as NORMAL, and shape on the CPU.

    `dtype` is the dtype of the tensor, unless it contains booleans or token ids.
    """
    normal = torch.randn(shape, generator=generator)
    if content == TRUTH:
        truth = normal > 0
        truth[..., 0] = True  # every query sees a key
        return truth
    if content == IDS:
        return torch.randint(50, shape, generator=generator)
    with trusted():  # the device may have no float64
        return CONTENTS[content](normal, dtype).to(dtype)


def _equal(x: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = x.round()
    rounded[0] = 1
    return rounded


def _masked(x: Tensor, dtype: torch.dtype) -> Tensor:
    hidden = torch.ones(x.shape, dtype=torch.bool).triu(1)
    hidden[-1] = False
    return x.masked_fill(hidden, -math.inf)


# Functions that make the contents from normally distributed numbers, except TRUTH and IDS.
CONTENTS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    NORMAL: lambda x, dtype: x,
    WEIGHTS: lambda x, dtype: x.relu(),
    LARGE: lambda x, dtype: x * 1e4,
    SCORES: lambda x, dtype: x * 1e3,
    EQUAL: _equal,
    MASKED: _masked,
    SMALL: lambda x, dtype: x * 1e-13,
    SUBNORMAL: lambda x, dtype: x.double() * torch.finfo(dtype).tiny / 8,
}
