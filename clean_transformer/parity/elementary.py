"""LayerNorm, softmax and GELU in float64, computed only with elementary operations.

The parity suite takes a float64 run of the model on the CPU as exact. But a fused kernel of the CPU
can be wrong in every dtype, also in float64. So `Elementary` computes these functions, and their
gradients, with operations such as add, multiply, exp and tanh.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Elementary(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that computes LayerNorm, softmax and GELU without the CPU's fused kernels.

    Only float64 calls on the CPU are replaced (see `FUNCTIONS`).
    """

    supports_higher_order_operators = True  # such as `flex_attention`, which stays unchanged

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function = FUNCTIONS.get(func.name())
        if function and args[0].dtype == torch.float64 and args[0].device.type == "cpu":
            return function(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x − mean) / √(var + eps) · weight + bias, the mean, and 1 / √(var + eps).

    The mean and the variance are taken over the last axes of `x`, which have the sizes `shape`. If
    `weight` is None, it counts as 1. If `bias` is None, it counts as 0.
    """
    axes = [*range(-len(shape), 0)]
    mean = x.mean(axes, keepdim=True)
    centered = x - mean
    reciprocal = 1 / ((centered * centered).mean(axes, keepdim=True) + eps).sqrt()
    output = centered * reciprocal
    output = output if weight is None else output * weight
    return output if bias is None else output + bias, mean, reciprocal


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    shape: list[int],
    mean: Tensor,
    reciprocal: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `layer_norm` with respect to x, weight and bias.

    `grad` is the gradient with respect to the output. `mean` and `reciprocal` are results of
    `layer_norm`. `wanted` says for x, weight and bias whether the gradient is needed. A gradient
    that is not needed is None.
    """
    axes = [*range(-len(shape), 0)]
    normalized = (x - mean) * reciprocal
    scaled = grad if weight is None else grad * weight
    along = scaled.mean(axes, keepdim=True)
    across = (scaled * normalized).mean(axes, keepdim=True)
    of_x = (scaled - along - normalized * across) * reciprocal
    of_weight, of_bias = (each.reshape(-1, *shape).sum(0) for each in (grad * normalized, grad))
    return (
        of_x if wanted[0] else None,
        of_weight if wanted[1] and weight is not None else None,
        of_bias if wanted[2] and bias is not None else None,
    )


def softmax(scores: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """Return exp(s − max s) / Σ exp(s − max s) for scores s, where max and Σ are along `dim`."""
    exp = (scores - scores.amax(dim, keepdim=True)).exp_()
    return exp.div_(exp.sum(dim, keepdim=True))


def softmax_backward(grad: Tensor, pattern: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return the gradient of `softmax` with respect to the scores; `pattern` is its output."""
    return pattern * (grad - (grad * pattern).sum(dim, keepdim=True))


def log_softmax(scores: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """Return s − max s − log Σ exp(s − max s) for scores s, where max and Σ are along `dim`."""
    below = scores - scores.amax(dim, keepdim=True)
    return below - below.exp().sum(dim, keepdim=True).log()


def log_softmax_backward(grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return the gradient of `log_softmax` with respect to the scores.

    `grad` is the gradient with respect to the output.
    """
    return grad - output.exp() * grad.sum(dim, keepdim=True)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Return GELU, x Φ(x). The function `gelu_factor` computes Φ(x)."""
    return gelu_factor(x, approximate).mul_(x)


def gelu_backward(grad: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """Return `grad` · (Φ(x) + x Φ'(x)), the gradient with respect to the input x of `gelu`."""
    factor = gelu_factor(x, approximate)
    if approximate == "tanh":
        inner_slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
        slope = 2 * factor * (1 - factor) * inner_slope
    else:
        slope = (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
    return grad * (factor + x * slope)


def gelu_factor(x: Tensor, approximate: str) -> Tensor:
    """Return Φ(x).

    If `approximate` is "tanh", Φ(x) is ½(1 + tanh(√(2/π)(x + 0.044715x³))), as in GPT-2. Otherwise
    Φ(x) is ½(1 + erf(x/√2)).
    """
    # In place, because x is large and new memory is slow.
    if approximate == "tanh":
        inner = (x * x).mul_(0.044715).add_(1).mul_(x).mul_(math.sqrt(2 / math.pi)).tanh_()
    else:
        inner = (x / math.sqrt(2)).erf_()
    return inner.add_(1).mul_(0.5)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "aten::native_layer_norm": layer_norm,
    "aten::native_layer_norm_backward": layer_norm_backward,
    "aten::_softmax": softmax,
    "aten::_softmax_backward_data": softmax_backward,
    "aten::_log_softmax": log_softmax,
    "aten::_log_softmax_backward_data": log_softmax_backward,
    "aten::gelu": gelu,
    "aten::gelu_backward": gelu_backward,
}
