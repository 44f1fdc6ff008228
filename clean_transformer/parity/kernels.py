"""Finds a float64 kernel of PyTorch whose results differ from those of NumPy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from clean_transformer.parity import numpy_gpt2
from clean_transformer.parity.elementary import Elementary
from clean_transformer.parity.operations.attention import ATTENTIONS, attention_arguments
from clean_transformer.parity.operations.replay import named_arguments, operation_name
from clean_transformer.parity.verdict import SAME_FUNCTION


def first_wrong_kernel(function: Callable[[], Any]) -> str:
    """Run `function()` in float64 on the CPU, and compare its ATen operations with NumPy.

    The table NUMPY says which operations are compared. Returns a sentence with the name and the
    error of the first operation that differs, or "" if no operation differs.
    """
    beside = _BesideNumPy()
    with beside, Elementary():
        function()
    return beside.wrong


class _BesideNumPy(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode whose `wrong` describes the first operation that differs from NumPy."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.wrong = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function = NUMPY.get(operation_name(func)) if not self.wrong else None
        # Copy the arguments before the call, because an in-place operation overwrites them.
        given = tree_map(_array, named_arguments(func, args, kwargs or {})) if function else {}
        output = func(*args, **(kwargs or {}))
        first = tree_leaves(output)[0]
        if function and first.dtype == torch.float64 and first.numel():
            wanted = function(**given)
            error = float(np.abs(first.numpy() - wanted).max() / (np.abs(wanted).max() or 1.0))
            if not error <= SAME_FUNCTION:
                self.wrong = f"{func} is wrong by {error:.1e} of its largest result, in float64 too"
        return output


def _array(value: Any) -> Any:
    return value.numpy().copy() if isinstance(value, Tensor) else value


def _attention(**named: Any) -> Any:
    tensors = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in named.items()}
    q, k, v, mask, scale = (_array(each) for each in attention_arguments(tensors))
    added = np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask
    return numpy_gpt2.softmax(scale * (q @ np.swapaxes(k, -1, -2)) + added) @ v


# Maps the names of ATen operations to the same operations in NumPy. Arguments have ATen's names.
NUMPY: dict[str, Callable[..., Any]] = {
    "mm": lambda self, mat2: self @ mat2,
    "bmm": lambda self, mat2: self @ mat2,
    "addmm": lambda self, mat1, mat2, beta, alpha: beta * self + alpha * (mat1 @ mat2),
    "add": lambda self, other, alpha: self + alpha * other,
    "sub": lambda self, other, alpha: self - alpha * other,
    "mul": lambda self, other: self * other,
    "div": lambda self, other: self / other,
    "reciprocal": lambda self: 1 / self,
    "sqrt": lambda self: np.sqrt(self),
    "exp": lambda self: np.exp(self),
    "tanh": lambda self: np.tanh(self),
    "sum": lambda self, dim, keepdim, dtype: self.sum(tuple(dim), keepdims=keepdim),
    "mean": lambda self, dim, keepdim, dtype: self.mean(tuple(dim), keepdims=keepdim),
    "amax": lambda self, dim, keepdim: self.max(tuple(dim), keepdims=keepdim),
    **dict.fromkeys(ATTENTIONS, _attention),
}
