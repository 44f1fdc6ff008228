"""Describes a call of an ATen operation: the memory layouts of its tensors, and other arguments."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Operand:
    """The shape, memory layout, dtype and device type of a tensor argument, without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, tensor: Tensor) -> "Operand":
        """Return the `Operand` that describes `tensor`."""
        return cls(
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
            tensor.device.type,
        )

    @property
    def is_contiguous(self) -> bool:
        """Whether the tensor's elements are in memory in row-major order, without gaps."""
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if length != 1 and stride != expected:
                return False
            expected *= length
        return True

    def contiguous(self) -> "Operand":
        """Return an `Operand` of the same shape with contiguous strides and storage offset 0."""
        stride = torch.empty(self.shape, device="meta").stride()
        return Operand(self.shape, stride, 0, self.dtype, self.device)


@dataclass(frozen=True)
class Call:
    """A description of a call of an ATen operation, without the values of its tensors.

    `operation` is a name such as "aten.mm.default". `operands` describes all tensor arguments, and
    all tensors in lists, in the order of the arguments. `arguments` has the positional arguments
    that are not tensors. `options` has a pair (name, value) for each keyword argument that is not a
    tensor.
    """

    operation: str
    operands: tuple[Operand, ...]
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, func: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> "Call":
        """Describe the call `func(*args, **kwargs)` of an ATen operation."""
        leaves = tree_leaves((tuple(args), kwargs))
        return cls(
            str(func),
            tuple(Operand.of(leaf) for leaf in leaves if isinstance(leaf, Tensor)),
            tuple(arg for arg in args if not isinstance(arg, Tensor)),
            tuple((name, value) for name, value in kwargs.items() if not isinstance(value, Tensor)),
        )

    @property
    def name(self) -> str:
        """The operation's name without namespace and overload: "mm" for "aten.mm.default"."""
        return self.operation.split(".")[1]


@dataclass(frozen=True)
class Numbers:
    """Statistics of a tensor's finite values, from which `sample` makes similar random numbers.

    `low`, `high`, `mean` and `deviation` are the smallest value, the largest value, the mean and
    the standard deviation. For floating-point tensors, they are rounded to six significant digits.
    `masked` is the fraction of all values that are −∞, as in an attention mask. `step` is 1 for
    integers. If a floating-point tensor has few different values, `step` is the mean distance from
    a value to the next larger value; otherwise it is 0. If at least one row (along the last axis)
    of a floating-point tensor has equal values only, `repeat` is the length of a row; otherwise
    `repeat` is 1.
    """

    low: float
    high: float
    mean: float
    deviation: float
    masked: float
    step: float
    repeat: int

    @classmethod
    def of(cls, values: Tensor) -> "Numbers":
        """Return the statistics of `values`.

        If no value is finite, `repeat` is 1, and all other statistics are 0.
        """
        exact = values.double()
        finite = exact[exact.isfinite()]
        if not finite.numel():
            return cls(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1)
        low, high, distinct = float(finite.min()), float(finite.max()), len(finite.unique())  # type: ignore[no-untyped-call]
        step = 0.0 if values.is_floating_point() else 1.0
        if not step and 1 < distinct <= min(64, finite.numel() // 2):
            step = (high - low) / (distinct - 1)
        rows = exact.reshape(-1, values.shape[-1] if values.ndim else 1)
        is_constant = values.is_floating_point() and bool((rows == rows[:, :1]).all(-1).any())
        repeat = rows.shape[1] if is_constant else 1
        digits = 6 if values.is_floating_point() else 17

        def rounded(value: float | Tensor) -> float:
            return float(f"{float(value):.{digits}g}")

        return cls(
            low=rounded(low),
            high=rounded(high),
            mean=rounded(finite.mean()),
            deviation=rounded(finite.std(correction=0)),
            masked=rounded((exact == -math.inf).double().mean()),
            step=rounded(step),
            repeat=repeat,
        )


def lay_out(values: Tensor, layout: Operand, device: torch.device | str) -> Tensor:
    """Copy `values` to a new tensor on `device`, with the stride and storage offset of `layout`."""
    length = layout.storage_offset + 1
    length += sum((n - 1) * step for n, step in zip(layout.shape, layout.stride, strict=True))
    # A faulty device may ignore the strides and read `numel` neighboring elements. An expanded
    # tensor has fewer elements than this in memory, so allocate at least `numel` elements.
    length = max(length, layout.storage_offset + values.numel())
    base = torch.zeros(length, dtype=values.dtype, device="cpu")
    places = torch.arange(base.numel(), device="cpu").as_strided(
        layout.shape, layout.stride, layout.storage_offset
    )
    base[places] = values
    return base.to(device).as_strided(layout.shape, layout.stride, layout.storage_offset)


def sample(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    low: float,
    high: float,
    mean: float,
    deviation: float,
    masked: float,
    step: float,
    repeat: int,
) -> Tensor:
    """Return random numbers from low to high, but -inf for the fraction `masked` of them."""
    last = offset + sum((n - 1) * m for n, m in zip(shape, stride, strict=True))
    length = max(1, last + repeat, offset + torch.Size(shape).numel())
    base = torch.randn(length).double() * deviation + mean
    base = ((base / step).round() * step if step else base).clamp(low, high)
    base[torch.rand(length) < masked] = -torch.inf
    base[offset : offset + repeat] = low
    base[last] = high
    return base.to(dtype).to(device).as_strided(shape, stride, offset)
