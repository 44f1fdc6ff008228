"""Device faults that affect only calls with unusual values, such as very large numbers.

These values seldom or never occur when GPT-2 runs on the suite's texts. Therefore the suite also
checks single operations on such values.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clean_transformer.parity.faults.corruptions import (
    SINGLE,
    Corruption,
    always,
    own,
    with_arguments,
    with_result,
)
from clean_transformer.parity.faults.sizes import ATTENTION, PRODUCTS
from clean_transformer.parity.operations.attention import attention, attention_arguments
from clean_transformer.parity.operations.replay import named_arguments
from clean_transformer.support.numerics import at_least_float32


def where_input(unusual: Callable[[Tensor], Tensor], value: float) -> Corruption:
    """Return a faulty version of an operation, which sets some elements of the result to `value`.

    These are the elements for which `unusual(first argument of the operation)` is True.
    """

    def corrupt(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        mask = unusual(args[0])
        return with_result(lambda result: result.masked_fill(mask, value))(func, args, options)

    return corrupt


def constant_rows(x: Tensor) -> Tensor:
    """Return a mask [… 1] that is True for each row [… n] of `x` whose elements are all equal."""
    return (x == x[..., :1]).all(-1, keepdim=True)


def shift_of_first_row(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compute softmax, but subtract the maximum of the whole tensor instead of each row's maximum.

    In a row whose numbers are all far below the tensor's maximum, the exponentials underflow to 0.
    """
    x = at_least_float32(args[0])
    powers = (x - x[x.isfinite()].max()).exp()
    return (powers / powers.sum(args[1], keepdim=True)).to(args[0].dtype)


def unshifted(scores: Tensor) -> Tensor:
    """Compute softmax without subtracting the maximum. In float32, scores above 88 overflow."""
    powers = scores.exp()
    return powers / powers.sum(-1, keepdim=True)


def unshifted_attention(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Compute attention with a softmax that overflows in float32 for scores above 88."""
    named = named_arguments(func, args, options)
    q, k, v, mask, scale = attention_arguments(named)
    q, k, v = (at_least_float32(x) for x in (q, k, v))
    mixed, _ = attention(q, k, v, mask, scale, unshifted)
    return with_result(lambda z: mixed.to(z.dtype))(func, args, options)


def finite_mask(x: Tensor) -> Tensor:
    """Replace −∞ by (the smallest finite element of `x`) − 20."""
    return x.masked_fill(x == -math.inf, float(x[x.isfinite()].min()) - 20)


def tiny_lost(product: Tensor) -> Tensor:
    """Set to 0 every number whose magnitude is below 1e-20."""
    return product.masked_fill(product.abs() < 1e-20, 0)


def ties_repeated(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run `topk` or `sort`, but return the same index for all values that are equal."""
    values, indices = func(*args, **options)
    first = (values[..., None] == values[..., None, :]).int().argmax(-1)
    return values, indices.gather(-1, first)


LATENT_FAULTS = (
    own(
        "gelu-large-input",
        "GELU of a number above 1,000 is NaN, because its cube is computed in half precision",
        "gelu",
        always,
        where_input(lambda x: x.abs() > 1000, math.nan),
        SINGLE,
    ),
    own(
        "softmax-maximum-of-tensor",
        "softmax subtracts the largest number of all rows, so that other rows underflow",
        "_softmax",
        always,
        shift_of_first_row,
        SINGLE,
    ),
    own(
        "sdpa-unshifted-softmax",
        "attention takes exp of its scores as they are, which overflows above 88",
        ATTENTION,
        always,
        unshifted_attention,
        SINGLE,
    ),
    own(
        "softmax-infinity-finite",
        "softmax takes −∞ for a finite number",
        "_softmax",
        always,
        with_arguments(finite_mask, 0),
        "hooks",
    ),
    own(
        "layer-norm-constant-row",
        "LayerNorm of a row of equal numbers is NaN, because eps is lost",
        "native_layer_norm",
        always,
        where_input(constant_rows, math.nan),
        SINGLE,
    ),
    own(
        "matmul-tiny-lost",
        "products lose numbers below 1e-20, although float32 has them down to 1e-38",
        PRODUCTS,
        lambda call: call.operands[0].dtype != torch.float16,
        with_result(tiny_lost),
        SINGLE,
    ),
    own(
        "topk-ties-repeated",
        "topk returns one index several times if values are equal",
        "topk",
        always,
        ties_repeated,
        SINGLE,
    ),
)
