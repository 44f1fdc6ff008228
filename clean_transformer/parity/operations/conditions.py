"""Functions of a call's arguments. The conditions of known issues and faults are built of them."""

from itertools import pairwise
from math import prod

import torch

from clean_transformer.parity.operations.call import Call, Operand


def factor_positions(operation: str) -> tuple[int, int]:
    """The positions of the two factors among a product's arguments.

    The first argument of `addmm` and `baddbmm` is the bias, so their factors come one later.
    """
    return (1, 2) if operation in ("addmm", "baddbmm") else (0, 1)


def factors(call: Call) -> tuple[Operand, Operand]:
    """The layouts of the two factors of a product."""
    left, right = factor_positions(call.name)
    return call.operands[left], call.operands[right]


def n_rows(call: Call) -> int:
    """The number of rows of a product's result. For `linear`, all leading axes count as rows."""
    left = factors(call)[0].shape
    return prod(left[:-1]) if call.name == "linear" else left[-2]


def n_columns(call: Call) -> int:
    """The number of columns of a product's result. The weight of `linear` has shape [out in]."""
    return factors(call)[1].shape[-2 if call.name == "linear" else -1]


def is_contiguous(call: Call, *positions: int) -> bool:
    """Whether all operands at the given positions are contiguous."""
    return all(call.operands[position].is_contiguous for position in positions)


def is_dtype(call: Call, *dtypes: torch.dtype) -> bool:
    """Whether the first operand has one of the given dtypes."""
    return call.operands[0].dtype in dtypes


def is_causal(call: Call) -> bool:
    """Whether an attention call has `is_causal=True`.

    As a positional argument, `is_causal` follows the dropout rate, which is a float.
    """
    placed = any(
        isinstance(before, float) and flag is True for before, flag in pairwise(call.arguments)
    )
    return placed or dict(call.options).get("is_causal") is True


def has_mask(call: Call) -> bool:
    """Whether an attention call has a mask, which is the fourth tensor."""
    return len(call.operands) > 3
