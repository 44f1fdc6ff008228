"""Functions that return facts about a call, such as the number of rows of its result.

The conditions of the known issues and of the device faults use these functions.
"""

from itertools import pairwise
from math import prod

import torch

from clean_transformer.parity.operations.call import Call, Operand


def factor_positions(operation: str) -> tuple[int, int]:
    """The positions of a matrix product's two factors in the list of its arguments.

    The factors of `addmm` and `baddbmm` have the positions 1 and 2, because the argument at
    position 0 is the bias. The factors of all other products have the positions 0 and 1.
    """
    return (1, 2) if operation in ("addmm", "baddbmm") else (0, 1)


def factors(call: Call) -> tuple[Operand, Operand]:
    """The layouts of the two factors of a matrix product."""
    left, right = factor_positions(call.name)
    return call.operands[left], call.operands[right]


def n_rows(call: Call) -> int:
    """The number of rows of the result of a matrix product.

    The result of `linear` has as many rows as the input has vectors: the product of the lengths of
    all axes of the input except its last axis.
    """
    left = factors(call)[0].shape
    return prod(left[:-1]) if call.name == "linear" else left[-2]


def n_columns(call: Call) -> int:
    """The number of columns of the result of a matrix product.

    The weight of `linear` has the shape [out in], so the number of columns is the length of its
    axis -2. The second factor of all other products has the shape [... in out].
    """
    return factors(call)[1].shape[-2 if call.name == "linear" else -1]


def is_contiguous(call: Call, *positions: int) -> bool:
    """Whether all operands at the given positions are contiguous."""
    return all(call.operands[position].is_contiguous for position in positions)


def is_dtype(call: Call, *dtypes: torch.dtype) -> bool:
    """Whether the first operand has one of the given dtypes."""
    return call.operands[0].dtype in dtypes


def is_causal(call: Call) -> bool:
    """Whether an attention call has `is_causal=True`.

    A `Call` does not know the names of its positional arguments. But the positional argument
    `is_causal` comes directly after the dropout rate, which is a float, and no other boolean comes
    directly after a float.
    """
    placed = any(
        isinstance(before, float) and flag is True for before, flag in pairwise(call.arguments)
    )
    return placed or dict(call.options).get("is_causal") is True


def has_mask(call: Call) -> bool:
    """Whether an attention call has a mask: a fourth tensor, after queries, keys and values."""
    return len(call.operands) > 3


def alpha(call: Call) -> float:
    """The factor `alpha` of a product in `addmm` or `baddbmm`."""
    return dict(call.options).get("alpha", 1)
