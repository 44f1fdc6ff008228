"""Runs code in float64, even where the code asks for a lower precision or another device."""

from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from clean_transformer.parity.oracle import UNIT_ROUNDOFF
from clean_transformer.support.numerics import upcast


class Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that uses float64 where the code asks for a lower floating-point dtype.

    A float64 copy of a module runs in this mode to compute exact results. Without the mode, the
    copy of a module that multiplies in bfloat16 would also multiply in bfloat16, and have the same
    error. `lowered` has the lower dtypes that the code has asked for.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lowered: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if isinstance(func, HigherOrderOperator) or func is torch.ops.aten.view.dtype:
            return func(*args, **keywords)
        return func(*tree_map(self._widened, args), **tree_map(self._widened, keywords))

    def _widened(self, value: Any) -> Any:
        if not isinstance(value, torch.dtype) or value not in UNIT_ROUNDOFF:
            return value
        if value is not torch.float64:
            self.lowered.add(value)
        return torch.float64


class OnCpuInFloat64(Float64):
    """A dispatch mode that runs any function in float64 on the CPU, without changing its tensors.

    A function may use tensors that are not among its arguments, such as the weights of a module. In
    this mode, every operation gets float64 copies on the CPU in place of such tensors. An operation
    that writes to a tensor writes to the copy, which later operations then read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: Any = WeakTensorKeyDictionary()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map(self._moved, (args, kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not isinstance(value, Tensor):
            return value
        is_lower = value.is_floating_point() and value.dtype != torch.float64
        if value.device.type == "cpu" and not is_lower:
            return value
        if value not in self.copies:
            with _disable_current_modes():
                self.copies[value] = upcast(value.detach().cpu())
        return self.copies[value]
