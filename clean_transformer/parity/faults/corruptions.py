"""Emulates faulty devices on the CPU: a dispatch mode makes the results of an operation wrong.

A fault affects only the calls for which its condition is True. A fault never affects a call with a
float64 operand, because the parity suite takes float64 results as exact.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clean_transformer.parity.operations.attention import attention, attention_arguments
from clean_transformer.parity.operations.call import Call
from clean_transformer.parity.operations.conditions import factor_positions, is_causal
from clean_transformer.parity.operations.known_issue import Condition
from clean_transformer.parity.operations.leads import emulating
from clean_transformer.parity.operations.replay import named_arguments

# `corrupt(operation, positional arguments, keyword arguments)` returns the call's wrong result.
Corruption = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
# The value of `DeviceFault.use` if a small GPT-2 makes no call that the fault affects. Only the
# suite's checks of single operations can find such a fault.
SINGLE = "single operations"
# A function that takes a tensor and returns a changed tensor.
Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DeviceFault:
    """A fault of the ATen operations named in `operations`.

    The fault affects the calls for which `condition(call)` is True. `corrupt` returns the wrong
    result of such a call. If `first_call_only` is True, the fault affects only the first such call
    inside the `with` block that plants the fault.

    `use` names a way to call GPT-2 that gives wrong results with this fault, such as "generate"
    or "training". Other ways can give wrong results, too. If a small GPT-2 makes no call that the
    fault affects, `use` is "single operations". `devices` has the kinds of devices that the fault
    emulates, such as "mps". While the fault is planted, reports name the known issues of these
    devices.
    """

    name: str
    description: str
    operations: frozenset[str]
    condition: Condition
    corrupt: Corruption
    first_call_only: bool = False
    use: str = "forward"
    devices: tuple[str, ...] = ()

    def touches(self, call: Call) -> bool:
        """Whether the fault affects the call. This method ignores `first_call_only`."""
        exact = any(operand.dtype == torch.float64 for operand in call.operands)
        return not exact and call.name in self.operations and self.condition(call)

    def plant(self) -> AbstractContextManager[Any]:
        """Return a context manager that plants the fault inside a `with` block."""
        return _FaultyDevice(self)


def own(
    name: str,
    description: str,
    operations: str,
    condition: Condition,
    corrupt: Corruption,
    use: str = "forward",
) -> DeviceFault:
    """Return a fault that nobody has reported, but that a device could have.

    `operations` has names of ATen operations, separated by spaces. The other arguments are fields
    of `DeviceFault`.
    """
    return DeviceFault(
        name, description, frozenset(operations.split()), condition, corrupt, use=use
    )


def always(call: Call) -> bool:
    """The condition of a fault that affects every call."""
    return True


class _FaultyDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, fault: DeviceFault):
        super().__init__()  # type: ignore[no-untyped-call]
        self.fault = fault
        self.spent = False

    def __enter__(self) -> Any:
        self.emulation = emulating(self.fault.devices)
        self.emulation.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.emulation.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if self.spent or not self.fault.touches(Call.of(func, args, options)):
            return func(*args, **options)
        self.spent = self.fault.first_call_only
        return self.fault.corrupt(func, tuple(args), options)


def with_arguments(edit: Edit, *positions: int) -> Corruption:
    """Return a faulty version of an operation, which runs the operation on edited arguments.

    `edit` changes the arguments at `positions`. The other arguments stay unchanged.
    """

    def corrupt(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        edited = (edit(arg) if place in positions else arg for place, arg in enumerate(args))
        return func(*edited, **options)

    return corrupt


def with_factors(edit: Edit, *, left: bool = True) -> Corruption:
    """Return a faulty version of a matrix product, which multiplies edited factors.

    By default, `edit` changes both factors. With `left=False`, it changes only the second factor.
    """

    def corrupt(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        positions = factor_positions(Call.of(func, args, options).name)
        return with_arguments(edit, *positions[0 if left else 1 :])(func, args, options)

    return corrupt


def with_result(edit: Edit) -> Corruption:
    """Return a faulty version of an operation, which changes the right result with `edit`.

    If the operation returns several tensors, `edit` changes only the first tensor.
    """

    def corrupt(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        result = func(*args, **options)
        return (edit(result[0]), *result[1:]) if isinstance(result, tuple) else edit(result)

    return corrupt


def attending(hides: Callable[[Tensor, Tensor, int], Tensor]) -> Corruption:
    """Return a faulty version of attention, which has a wrong mask.

    A query does not see a key if `hides(query position, key position, number of keys)` is True. The
    positions of the keys are 0, 1, …. In a call with `is_causal`, the positions of the queries are
    also 0, 1, …. In any other call, all queries are at positions after the last key, so that no key
    comes after a query.
    """

    def corrupt(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        q, k, v = (argument.float() for argument in args[:3])
        scale = options.get("scale") or 1 / math.sqrt(q.shape[-1])
        key = torch.arange(k.shape[-2], device=k.device)
        query = torch.arange(q.shape[-2], device=q.device)[:, None]
        if not is_causal(Call.of(func, args, options)):
            query = query + len(key)
        mixed, _ = attention(q, k, v, ~hides(query, key, len(key)), scale)
        return with_result(lambda z: mixed.to(z.dtype))(func, args, options)

    return corrupt


def shifted(result: Tensor) -> Tensor:
    """Roll the tensor by one element along its last axis."""
    return result.roll(1, -1)


def rounded_scores(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compute attention, and round its masked scores to bfloat16 before the softmax."""
    q, k, v, mask, scale = attention_arguments(named_arguments(func, args, options))
    mask = mask if mask.dtype == torch.bool else mask.float()
    mixed, _ = attention(
        q.float(), k.float(), v.float(), mask, scale, lambda s: s.bfloat16().float().softmax(-1)
    )
    return with_result(lambda z: mixed.to(z.dtype))(func, args, options)


def alpha_ignored(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run `addmm` or `baddbmm` with alpha = 1."""
    return func(*args, **(options | {"alpha": 1}))


def as_if_contiguous(tensor: Tensor) -> Tensor:
    """Read the memory of a tensor as if the tensor were contiguous.

    The result has the tensor's shape. Its elements are read one after another from the tensor's
    first element on, whatever the strides are. At the end of the memory, reading continues at the
    tensor's first element.
    """
    offset = tensor.storage_offset()
    n_left = tensor.untyped_storage().nbytes() // tensor.element_size() - offset
    memory = tensor.as_strided((n_left,), (1,), offset)
    return memory.repeat(-(-tensor.numel() // n_left))[: tensor.numel()].view(tensor.shape)


def rounded(mantissa_bits: int) -> Edit:
    """Return a function that rounds float32 tensors to `mantissa_bits` bits of mantissa.

    The function returns tensors of other dtypes unchanged.
    """
    dropped = 23 - mantissa_bits

    def edit(tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        nearest = tensor.view(torch.int32) + (1 << (dropped - 1))
        return (nearest >> dropped << dropped).view(torch.float32)

    return edit


def unmasked(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compute attention without its mask."""
    rest = (None if isinstance(arg, Tensor) else arg for arg in args[3:])
    kept = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
    return func(*args[:3], *rest, **kept)


def batch_dependent(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compute the first 8 rows of a matrix product correctly, and its other rows in TF32."""
    right = func(*args, **options)
    coarse = with_factors(rounded(10))(func, args, options)
    return torch.cat([right[:8], coarse[8:]])


def half_accumulator(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compute a matrix product in blocks of 8 terms, and add up the blocks in half precision."""
    *bias, left, right = args
    total = bias[0] if bias else torch.zeros((), dtype=left.dtype, device=left.device)
    for part, other in zip(left.split(8, -1), right.split(8, -2), strict=True):
        total = func(total, part, other) if bias else total + func(part, other)
    return total


def half_statistics(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compute LayerNorm's mean and variance in half precision instead of float32."""
    x, _, weight, bias, eps = args
    centered = x - x.mean(-1, keepdim=True)
    normalized = centered * (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    scaled = normalized if weight is None else normalized * weight
    return with_result(lambda _: scaled if bias is None else scaled + bias)(func, args, options)


def half_imprecise(result: Tensor) -> Tensor:
    """Multiply the second half of the elements, in row-major order, by 1 + 2,000 · 2⁻²³.

    In float32, this is an error of 2,000 to 4,000 units in the last place.
    """
    place = torch.arange(result.numel(), device=result.device).view(result.shape)
    return torch.where(place < result.numel() // 2, result, result * (1 + 2000 * 2**-23))


def first_columns_repeated(product: Tensor) -> Tensor:
    """Replace column j of the product by column j mod 1,024, for every j from 1,024 on."""
    return product[..., torch.arange(product.shape[-1], device=product.device) % 1024]


def edge_tile_zeroed(product: Tensor) -> Tensor:
    """Set the last n mod 16 columns of a matrix with n columns to zero."""
    column = torch.arange(product.shape[-1], device=product.device)
    return product.masked_fill(column >= len(column) // 16 * 16, 0)


def from_storage_start(tensor: Tensor) -> Tensor:
    """Return a view with the tensor's storage, shape and strides, but with the storage offset 0."""
    return tensor.as_strided(tensor.shape, tensor.stride(), 0)


def past_the_end(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run `multinomial`, but add the number of categories to each drawn index."""
    return func(*args, **options) + args[0].shape[-1]


def tanh_ignored(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compute the exact form of GELU, although the caller asked for the tanh form."""
    return func(*args)


def first_entry_filled(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run `masked_fill` only for the first text of the batch. The other texts stay unchanged."""
    return torch.cat([func(*args, **options)[:1], args[0][1:]])
