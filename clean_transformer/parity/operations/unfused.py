"""Computes fused ATen operations with several simple operations, on the device under test.

If the simple operations give the right result, then only the fused kernel is wrong. In every
function of this file, the argument `named` maps the names of the operation's arguments to their
values.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from clean_transformer.parity.operations.attention import (
    ATTENTIONS,
    attention,
    attention_arguments,
)
from clean_transformer.support.numerics import at_least_float32

Named = Mapping[str, Any]


def addmm(named: Named) -> Tensor:
    """Return β · self + α · mat1 mat2, where "self" is the name of the bias in `named`."""
    return named["beta"] * named["self"] + named["alpha"] * torch.mm(named["mat1"], named["mat2"])


def linear(named: Named) -> Tensor:
    """Return x Wᵀ + b, or x Wᵀ if the bias is None."""
    product = named["input"] @ named["weight"].T
    return product if named["bias"] is None else product + named["bias"]


def softmax(named: Named) -> Tensor:
    """Return exp(x - max x) / Σ exp(x - max x), with max and Σ along the axis `dim`."""
    x, dim = named["self"], named["dim"]
    powers = (x - x.amax(dim, keepdim=True)).exp()
    return powers / powers.sum(dim, keepdim=True)


def layer_norm(named: Named) -> Tensor:
    """Return (x - mean) / √(var + eps) · w + b in the dtype of the input x.

    If the input is in half precision, the operations run in float32.
    """
    given, weight, bias = named["input"], named["weight"], named["bias"]
    x = at_least_float32(given)
    axes = tuple(range(-len(named["normalized_shape"]), 0))
    centered = x - x.mean(axes, keepdim=True)
    scale = ((centered * centered).mean(axes, keepdim=True) + named["eps"]).sqrt()
    normalized = centered / scale
    normalized = normalized if weight is None else normalized * weight
    return (normalized if bias is None else normalized + bias).to(given.dtype)


def gelu(named: Named) -> Tensor:
    """Return ½x(1 + tanh(√(2/π)(x + 0.044715x³))) if `approximate` is "tanh".

    Otherwise return the exact form ½x(1 + erf(x/√2)).
    """
    given = named["self"]
    x = at_least_float32(given)
    inner = (
        (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh()
        if named["approximate"] == "tanh"
        else (x / math.sqrt(2)).erf()
    )
    return (0.5 * x * (1 + inner)).to(given.dtype)


UNFUSED: dict[str, Callable[[Named], Tensor]] = {
    "addmm": addmm,
    "linear": linear,
    "_softmax": softmax,
    "native_layer_norm": layer_norm,
    "gelu": gelu,
    **dict.fromkeys(ATTENTIONS, lambda named: attention(*attention_arguments(named))[0]),
}
