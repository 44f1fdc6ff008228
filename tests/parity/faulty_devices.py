"""Small faulty devices: dispatch modes that spoil one operation under one condition."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Faulty(TorchDispatchMode):
    """`spoil(args, output)` changes the output of that operation, but never in float64."""

    def __init__(self, name: str, spoil: Callable[[Any, Any], Any]):
        super().__init__()
        self.name, self.spoil = name, spoil

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if str(func).split(".")[1] != self.name or torch.float64 in dtypes(args):
            return output
        return self.spoil(args, output)


class RefusesFloat64(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if torch.float64 in dtypes((args, kwargs, output)):
            raise TypeError("this device has no float64")
        return output


def dtypes(values: Any) -> set[torch.dtype]:
    return {leaf.dtype for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def noncontiguous_second_operand(args: Any, output: Tensor) -> Tensor:
    return output if args[1].is_contiguous() else output.flip(-1)


def noncontiguous_input(args: Any, output: Tensor) -> Tensor:
    return output if args[0].is_contiguous() else output.flip(-1)


def ignored_storage_offset(args: Any, output: Any) -> Any:
    x = args[0]
    if not x.storage_offset():
        return output
    return torch.ops.aten.native_layer_norm(x.as_strided(x.shape, x.stride(), 0), *args[1:])


def leaks_the_future(args: Any, output: Any) -> Any:
    q, k, v, _, is_causal = (*args, 0.0, False)[:5]
    if not is_causal:
        return output
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(3)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    z = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    return (z, *output[1:])


def only_the_first_1024_columns(args: Any, output: Tensor) -> Tensor:
    return torch.where(torch.arange(output.shape[-1]) < 1024, output, 0.0)


def as_tf32(args: Any, output: Tensor) -> Tensor:
    def rounded(x: Tensor) -> Tensor:
        return (((x.view(torch.int32) + (1 << 12)) >> 13) << 13).view(torch.float32)

    *bias, left, right = args
    return sum(bias, rounded(left) @ rounded(right))


def int64_min(args: Any, output: Tensor) -> Tensor:
    return torch.full_like(output, torch.iinfo(torch.int64).min)
