"""Runs a module in float64, even where its code asks for a lower precision."""

from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from clean_transformer.parity.oracle import UNIT_ROUNDOFF


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
