"""Functions that return facts about a call, such as the number of rows of its result."""

from itertools import pairwise
from math import prod

import torch

from clean_transformer.parity.operations.call import Call, Operand


def factor_positions(operation: str) -> tuple[int, int]:
    """The positions of a matrix product's two factors in `Call.operands`.

    In `addmm` and `baddbmm`, the factors have the positions 1 and 2, because the bias has position
    0. In all other products, the factors have the positions 0 and 1.
    """
    return (1, 2) if operation in ("addmm", "baddbmm") else (0, 1)


def factors(call: Call) -> tuple[Operand, Operand]:
    """The layouts of the two factors of a matrix product."""
    left, right = factor_positions(call.name)
    return call.operands[left], call.operands[right]


def n_rows(call: Call) -> int:
    """The number of rows of the result of a matrix product.

    For `linear`, it is the product of the lengths of all axes of the input except the last axis.
    """
    left = factors(call)[0].shape
    return prod(left[:-1]) if call.name == "linear" else left[-2]


def n_columns(call: Call) -> int:
    """The number of columns of the result of a matrix product.

    For `linear`, it is the length of axis -2 of the weight [out in]. For all other products, it is
    the length of axis -1 of the second factor [... in out].
    """
    return factors(call)[1].shape[-2 if call.name == "linear" else -1]


def n_terms(call: Call) -> int:
    """The number of terms in each sum of a matrix product: the length of the rows of its input."""
    return factors(call)[0].shape[-1]


def is_contiguous(call: Call, *positions: int) -> bool:
    """Whether all operands of the call at the given positions are contiguous."""
    return all(call.operands[position].is_contiguous for position in positions)


def is_transposed(operand: Operand) -> bool:
    """Whether the two last axes of a tensor are swapped in memory: its columns are contiguous."""
    return not operand.is_contiguous and operand.stride[-2] == 1


def is_dtype(call: Call, *dtypes: torch.dtype) -> bool:
    """Whether the first operand of the call has one of the given dtypes."""
    return call.operands[0].dtype in dtypes


def is_causal(call: Call) -> bool:
    """Whether an attention call has `is_causal=True`."""
    # A `Call` does not store the names of positional arguments. So look for True directly after a
    # float: the positional argument `is_causal` comes directly after the dropout rate, which is a
    # float. No other boolean comes directly after a float.
    placed = any(
        isinstance(before, float) and flag is True for before, flag in pairwise(call.arguments)
    )
    return placed or dict(call.options).get("is_causal") is True


def has_mask(call: Call) -> bool:
    """Whether an attention call has a mask: a fourth tensor, after queries, keys and values."""
    return len(call.operands) > 3


def has_unlike_strides(call: Call) -> bool:
    """Whether two operands of the call have the same shape, but different strides."""
    shapes = {operand.shape for operand in call.operands}
    return len({(operand.shape, operand.stride) for operand in call.operands}) > len(shapes)


def alpha(call: Call) -> float:
    """The factor `alpha` by which `addmm` and `baddbmm` multiply the product; 1 by default."""
    return float(dict(call.options).get("alpha", 1))


def beta(call: Call) -> float:
    """The factor `beta` by which `addmm` and `baddbmm` multiply the added tensor; 1 by default."""
    return float(dict(call.options).get("beta", 1))
