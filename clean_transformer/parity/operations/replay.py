"""Repeats a call of an operation on the CPU in float64, with the device's own inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from clean_transformer.parity.oracle import UNIT_ROUNDOFF


@dataclass(frozen=True)
class Call64:
    """A call to be repeated in float64. Its tensors are contiguous copies on the CPU.

    `dtype` is the dtype of the device's result.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The operation's name, also for its in-place form: "add" of "aten::add_"."""
        return operation_name(self.func)

    @property
    def u(self) -> float:
        """The unit roundoff of the result's dtype; 0 for integers and booleans."""
        return UNIT_ROUNDOFF.get(self.dtype, 0.0)

    @cached_property
    def named(self) -> dict[str, Any]:
        """The arguments by their names in the operation's schema, with tensors in float64."""
        return named_arguments(self.func, *tree_map(_double, (self.args, self.kwargs)))

    def run(self, change: Callable[[Any], Any] = lambda number: number) -> Any:
        """The result in float64, after `change` of every real tensor and number that goes in."""
        args, kwargs = tree_map(_double, (self.args, self.kwargs))
        args = tree_map(lambda x: change(x) if _is_real(x) else x, args)
        kwargs = {
            key: change(x) if _is_real(x) or key in ("alpha", "beta") else x
            for key, x in kwargs.items()
        }
        return self.func(*args, **kwargs)

    def run_as_given(self) -> Any:
        """The result in the tensors' own dtypes, for operations that only move numbers."""
        args, kwargs = tree_map(_copied, (self.args, self.kwargs))
        return self.func(*args, **kwargs)


@dataclass(frozen=True)
class Expected:
    """What one output of a call must be.

    `scale` is G, elementwise, or None where the output must equal `exact`. `healthy` and `wrong`
    are the limits of |device − exact| / (u G). `typical()` is what independent roundings are
    relative to (see `limits.typical_size`). It tells a lower precision from corruption, and is
    computed only after a failure. `observe(output)` is what is compared of the device's output.
    """

    exact: Tensor
    scale: Tensor | None = None
    typical: Callable[[], Tensor] | None = None
    healthy: float = 0.0
    wrong: float = 0.0
    observe: Callable[[Tensor], Tensor] = lambda output: output


def operation_name(func: Any) -> str:
    """The operation's name without namespace, overload and the underscore of in-place forms."""
    name = str(func._schema.name).split("::")[1]
    return name.removesuffix("_") if func._schema.is_mutable else name


def named_arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by their names in the operation's schema, including its defaults."""
    schema = func._schema.arguments
    defaults = {arg.name: arg.default_value for arg in schema if arg.has_default_value()}
    return defaults | dict(zip((arg.name for arg in schema), args, strict=False)) | kwargs


def _is_real(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return _on_cpu(value)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else _on_cpu(value)


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value
