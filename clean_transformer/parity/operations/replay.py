"""Repeats a call of an ATen operation in float64 on the CPU, with the inputs from the device."""

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
    """A call of an ATen operation that can be repeated in float64 on the CPU.

    `func` is the operation. `args` and `kwargs` are the call's arguments, in which all tensors are
    contiguous copies on the CPU in their original dtypes. `dtype` is the dtype of the first
    floating-point output of the device, or int64 if there is no such output.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The operation's name without namespace and final "_": "add" for "aten::add_"."""
        return operation_name(self.func)

    @property
    def u(self) -> float:
        """The unit roundoff of `dtype`; 0 if `dtype` is an integer type or bool."""
        return UNIT_ROUNDOFF.get(self.dtype, 0.0)

    @cached_property
    def named(self) -> dict[str, Any]:
        """All arguments of the call, by their names in the operation's schema.

        Floating-point tensors are converted to float64.
        """
        return named_arguments(self.func, *tree_map(self._double, (self.args, self.kwargs)))

    def run(self, change: Callable[[Any], Any] = lambda number: number) -> Any:
        """Run the operation in float64, and return its result.

        Before the run, every floating-point tensor x and every Python float x is replaced by
        `change(x)`. So `run(abs)` of a product x W returns |x| |W|. The keyword arguments `alpha`
        and `beta` are replaced too. By default, nothing is replaced.
        """
        args, kwargs = tree_map(self._double, (self.args, self.kwargs))
        args = tree_map(lambda x: change(x) if _is_real(x) else x, args)
        kwargs = {
            key: change(x) if _is_real(x) or key in ("alpha", "beta") else x
            for key, x in kwargs.items()
        }
        return run_call(self.func, args, kwargs)

    def run_as_given(self) -> Any:
        """Run the operation in the original dtypes of its tensors, and return its result.

        Use this method for operations whose result has no rounding error, such as a gather.
        """
        args, kwargs = tree_map(_copied, (self.args, self.kwargs))
        return run_call(self.func, args, kwargs)

    def _double(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            dtype = torch.float64 if value.is_floating_point() else value.dtype
            # An in-place operation needs a copy, even of a tensor that has this dtype already.
            return value.to(dtype, copy=self.func._schema.is_mutable)
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        return _on_cpu(value)


@dataclass(frozen=True)
class Expected:
    """The exact value of one output of a call, and the largest errors that are allowed.

    If `scale` is None, the device's output must equal `exact`. Otherwise, `scale` has a number G
    for each element. For a sum, G is about the sum of the absolute values of its terms. The error
    ratio of an element is |device − exact| / (u G + η), where u is the dtype's unit roundoff and η
    its underflow threshold (see `parity/limits.py`). If the largest ratio is at most `healthy`, the
    verdict is PASS. If it is above `wrong`, and no lower precision such as TF32 explains the error,
    the verdict is WRONG. Otherwise the verdict is DEGRADED.

    If a few large terms dominate a sum, larger errors are healthy. For this case, `typical()`
    returns the typical rounding error of each element, divided by u. If `typical` is not None, an
    error up to `dominated` · u · min(`typical()`, G) is healthy even if its ratio is above
    `healthy`.

    `observe(output)` turns the device's output into the tensor that is compared with `exact`.

    If `proves` is False, the limits are estimates. Then a call with a larger error is NOT CHECKED
    instead of DEGRADED or WRONG.
    """

    exact: Tensor
    scale: Tensor | None = None
    typical: Callable[[], Tensor] | None = None
    healthy: float = 0.0
    wrong: float = 0.0
    dominated: float = 0.0
    observe: Callable[[Tensor], Tensor] = lambda output: output
    proves: bool = True


def operation_name(func: Any) -> str:
    """The operation's name without namespace and overload: "mm" for "aten::mm.default".

    The "_" at the end of the name of an in-place operation is removed: "add" for "aten::add_".
    """
    name = str(func._schema.name).split("::")[1]
    return name.removesuffix("_") if func._schema.is_mutable else name


def run_call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation, and return its results, even if it only writes them into its arguments."""
    return computed(func, args, kwargs, func(*args, **kwargs))


def computed(func: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Return what a call has computed; `output` is its return value.

    This is `output`, unless the operation returns nothing, like `_foreach_add_` and
    `_fused_adamw_`. Then the result is a list of the arguments that the operation overwrites.
    """
    if func._schema.returns:
        return output
    named = named_arguments(func, args, kwargs)
    return [named[arg.name] for arg in func._schema.arguments if is_overwritten(arg)]


def is_overwritten(argument: Any) -> bool:
    """Whether an operation overwrites the argument, an element of its schema's `arguments`."""
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def named_arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of the operation by their names in its schema.

    Arguments that are neither in `args` nor in `kwargs` have their default values.
    """
    schema = func._schema.arguments
    defaults = {arg.name: arg.default_value for arg in schema if arg.has_default_value()}
    return defaults | dict(zip((arg.name for arg in schema), args, strict=False)) | kwargs


def _is_real(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point())


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else _on_cpu(value)


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value
