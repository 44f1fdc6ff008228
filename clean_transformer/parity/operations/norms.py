"""Rules for LayerNorm, batch norm, instance norm and group norm, and for their gradients.

A rule returns an `Expected` (exact value and allowed error) for each output of a call. The exact
values are computed from formulas, not with PyTorch's kernels. So a kernel that is wrong even in
float64 is found, too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clean_transformer.parity.limits import LAYER_NORM, NORM
from clean_transformer.parity.operations.backward import running_total
from clean_transformer.parity.operations.replay import Call64, Expected
from clean_transformer.parity.operations.rules import Rule, rows, within
from clean_transformer.parity.scales import Size, layer_norm_scales


@dataclass(frozen=True)
class _Norm:
    """The input, the gain and the bias of a norm, in shapes that can be multiplied.

    `axes` are the axes of `x` over which the norm takes the mean and the variance. `summed` are the
    axes of `x` over which the gradients of the gain and the bias are sums.
    """

    call: Call64
    x: Tensor
    axes: tuple[int, ...]
    summed: tuple[int, ...]
    gain: Tensor | None
    bias: Tensor | None

    @property
    def is_running(self) -> bool:
        """Whether batch norm uses its running statistics, as in evaluation mode."""
        training = self.call.named.get("training", self.call.named.get("train"))
        return self.call.named.get("running_mean") is not None and not training

    def per_mean(self, values: Tensor) -> Tensor:
        """Reshape `values`, which has a number for each mean, to multiply it by x."""
        return values.reshape(
            [1 if axis in self.axes else length for axis, length in enumerate(self.x.shape)]
        )

    def within(self, exact: Tensor, scale: Tensor, shape: Sequence[int]) -> Expected:
        """Return an `Expected` with the exact value and its G, both reshaped to `shape`."""
        terms = math.prod(self.x.shape[axis] for axis in self.axes)
        kind = LAYER_NORM if "normalized_shape" in self.call.named else NORM
        return within(kind, self.call, exact.reshape(shape), scale.reshape(shape), terms)


def _norm(call: Call64) -> _Norm:
    named = call.named
    x, gain, bias = named["input"], named["weight"], named.get("bias")
    shape: tuple[int, ...]
    if "normalized_shape" in named:
        first = x.ndim - len(named["normalized_shape"])
        return _Norm(call, x, tuple(range(first, x.ndim)), tuple(range(first)), gain, bias)
    if "group" in named:
        x = x.reshape(named["N"], named["group"], named["C"] // named["group"], named["HxW"])
        axes, summed, shape = (2, 3), (0, 3), (1, named["group"], -1, 1)
    else:
        axes = summed = (0, *range(2, x.ndim))
        shape = (1, -1, *(1 for _ in axes[1:]))
    gain, bias = (None if each is None else each.reshape(shape) for each in (gain, bias))
    return _Norm(call, x, axes, summed, gain, bias)


def _forward(call: Call64) -> list[Expected | None]:
    """Return a norm's exact outputs, and the allowed errors.

    The outputs are the normalized input (after gain and bias), the mean, and 1/σ. If batch norm
    uses its running statistics, only the first output is compared.
    """
    named, norm = call.named, _norm(call)
    x, eps = norm.x, named["epsilon" if "epsilon" in named else "eps"]
    if norm.is_running:
        mean, variance = norm.per_mean(named["running_mean"]), norm.per_mean(named["running_var"])
        size = (x.abs() + mean.abs()) / (variance + eps).sqrt()
    else:
        mean = x.mean(norm.axes, keepdim=True)
        variance = (x - mean).square().mean(norm.axes, keepdim=True)
        size, of_mean, of_sigma = layer_norm_scales(x, eps, norm.axes)
    reciprocal = 1 / (variance + eps).sqrt()
    exact = (x - mean) * reciprocal
    if norm.gain is not None:
        exact, size = exact * norm.gain, size * norm.gain.abs()
    if norm.bias is not None:
        exact, size = exact + norm.bias, size + norm.bias.abs()
    output = norm.within(exact, size, named["input"].shape)
    if norm.is_running:
        return [output]
    # LayerNorm keeps the normalized axes of its mean, with length 1.
    kept = "normalized_shape" in named
    shape = mean.shape if kept else [n for i, n in enumerate(x.shape) if i not in norm.axes]
    # An error δσ of σ changes 1/σ by δσ/σ².
    return [
        output,
        norm.within(mean, of_mean, shape),
        norm.within(reciprocal, of_sigma * reciprocal.square(), shape),
    ]


def _backward(call: Call64) -> list[Expected | None]:
    """Return a norm's exact gradients for its input x, gain and bias, and the allowed errors.

    Let n = (x − mean)/σ and h = g · gain, where g is the gradient with respect to the output. The
    gradients are (h − mean h − n mean(h n))/σ for x, Σ g n for the gain, and Σ g for the bias. Each
    mean is taken over the normalized axes, and each sum Σ over the other axes of the gain. If batch
    norm uses its running statistics, the gradient for x is h/σ. The result has None for a gradient
    that the call does not ask for.
    """
    named, norm = call.named, _norm(call)
    x, g = norm.x, named["grad_out"].reshape(norm.x.shape)
    if norm.is_running:
        mean = norm.per_mean(named["running_mean"])
        reciprocal = 1 / (norm.per_mean(named["running_var"]) + named["eps"]).sqrt()
    else:
        mean = norm.per_mean(named["mean" if "mean" in named else "save_mean"])
        reciprocal = norm.per_mean(named["rstd" if "rstd" in named else "save_invstd"])
    # n is the difference x − mean, so the size of its terms is |x| + |mean|.
    normalized, size = (x - mean) * reciprocal, (x.abs() + mean.abs()) * reciprocal
    h = g if norm.gain is None else g * norm.gain

    def average(values: Tensor) -> Tensor:
        return values.mean(norm.axes, keepdim=True)

    exact, scale = h, h.abs()
    if not norm.is_running:
        exact = h - average(h) - normalized * average(h * normalized)
        scale = scale + average(h.abs()) + size * average(h.abs() * size)
    of_input = norm.within(reciprocal * exact, reciprocal * scale, named["input"].shape)

    def of_parameter(factor: Tensor, factor_size: Tensor) -> Expected:
        def over_rows(values: Tensor) -> Tensor:
            total = values.sum(norm.summed) if norm.summed else values
            return total if "normalized_shape" in named else total.flatten()

        def terms(change: Size) -> Tensor:
            return over_rows(change(g) * change(factor_size))

        n_rows = math.prod(x.shape[axis] for axis in norm.summed)
        return running_total(call, over_rows(g * factor), terms, n_rows)

    ones = torch.ones_like(x)
    outputs = (of_input, of_parameter(normalized, size), of_parameter(ones, ones))
    wanted = named["output_mask"]
    return [output if asked else None for output, asked in zip(outputs, wanted, strict=True)]


NORMS: dict[str, Rule] = {
    **rows("native_layer_norm layer_norm native_group_norm", _forward),
    **rows(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
        "cudnn_batch_norm miopen_batch_norm",
        _forward,
    ),
    **rows(
        "native_layer_norm_backward native_group_norm_backward native_batch_norm_backward",
        _backward,
    ),
}
