"""Device faults that affect only generation, padded batches, beam search or sampling."""

import math
from typing import Any

import torch
from torch import Tensor

from clean_transformer.parity.faults.corruptions import (
    own,
    shifted,
    with_arguments,
    with_result,
)
from clean_transformer.parity.operations.call import Call
from clean_transformer.parity.operations.conditions import is_dtype


def is_wide(call: Call) -> bool:
    """Whether the last axis of the first operand is longer than 1,000."""
    shape = call.operands[0].shape
    return bool(shape) and shape[-1] > 1000


def writes_cache(call: Call) -> bool:
    """Whether `call`, a call of `copy_`, writes into a KV cache at position 1 or later.

    The function recognizes such a call by the tensor that is written to: it has the shape [batch
    pos head d_head], and its storage offset is at least the stride of one position.
    """
    target = call.operands[0]
    return len(target.shape) == 4 and target.storage_offset >= target.stride[1] > 0


def slot_before(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run `copy_`, but write into a KV cache one position too early.

    The old values at this earlier position move to the last position that `copy_` should write to.
    """
    target, source = args[0], args[1]
    early = target.as_strided(
        target.shape, target.stride(), target.storage_offset() - target.stride(1)
    )
    before = early[:, :1].clone()
    func(early, source, *args[2:], **options)
    func(target[:, -1:], before, *args[2:], **options)
    return target


def rows_in_order(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run `index` with sorted indices, so that the rows come in the order of the memory."""
    return func(args[0], [args[1][0].sort().values], *args[2:], **options)


def first_row_for_all(mask: Tensor) -> Tensor:
    """Replace the mask of every text by the mask of the first text."""
    return mask[:1].expand_as(mask)


def restarting(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run `cumsum`, but start again from 0 after every 16 columns."""
    parts = args[0].split(16, -1)
    return torch.cat([func(part, *args[1:], **options) for part in parts], -1)


def least_likely(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run `multinomial`, but return the index with the smallest weight for every draw."""
    drawn = func(*args, **options)
    return args[0].argmin(-1, keepdim=True).expand_as(drawn)


def last_index_dropped(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run `index_put_` without the last index and its value."""
    indices = [each[:-1] for each in args[1]]
    values = args[2][:-1] if args[2].ndim else args[2]
    return func(args[0], indices, values, *args[3:], **options)


def upper_half_unscattered(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run `scatter` on only the first half of the columns."""
    half = args[2].shape[-1] // 2
    return func(*args[:2], args[2][..., :half], args[3][..., :half], **options)


GENERATION_FAULTS = (
    own(
        "cache-write-early",
        "keys and values are stored one position too early",
        "copy_",
        writes_cache,
        slot_before,
        "generate",
    ),
    own(
        "cache-rows-in-order",
        "rows of a cache [batch pos head d_head] are selected, but not reordered",
        "index",
        lambda call: len(call.operands[0].shape) == 4,
        rows_in_order,
        "beams",
    ),
    own(
        "mask-of-first-text",
        "a mask of several texts is that of the first text for all",
        "bitwise_and",
        lambda call: len(call.operands[1].shape) == 4,
        with_result(first_row_for_all),
        "unequal batch",
    ),
    own(
        "positions-unshifted",
        "positions − padding is the positions, if the padding has an axis of length 1",
        "sub",
        lambda call: is_dtype(call, torch.int64) and call.operands[-1].shape[-1:] == (1,),
        with_arguments(torch.zeros_like, 1),
        "unequal batch",
    ),
    own(
        "argmax-wide",
        "argmax over more than 1,000 columns returns the next column",
        "argmax",
        is_wide,
        with_result(lambda index: index + 1),
        "sampling",
    ),
    own(
        "sort-wide",
        "sort over more than 1,000 columns returns the largest value last",
        "sort",
        is_wide,
        with_result(lambda values: values.roll(-1, -1)),
        "sampling",
    ),
    own(
        "topk-wide",
        "topk over more than 1,000 columns leaves out the largest value",
        "topk",
        is_wide,
        with_result(lambda values: torch.cat([values[..., 1:], values[..., -1:]], -1)),
        "sampling",
    ),
    own(
        "softmax-wide",
        "softmax over more than 1,000 columns has its columns shifted",
        "_softmax",
        is_wide,
        with_result(shifted),
        "sampling",
    ),
    own(
        "log-softmax-wide",
        "log_softmax over more than 1,000 columns is not normalized",
        "_log_softmax",
        is_wide,
        with_result(lambda logs: logs + math.log(2)),
        "sampling",
    ),
    own(
        "cumsum-wide",
        "cumulative sums start anew every 16 columns",
        "cumsum",
        is_wide,
        restarting,
        "sampling",
    ),
    own(
        "scatter-wide",
        "scatter over more than 1,000 columns writes only half of them",
        "scatter",
        is_wide,
        upper_half_unscattered,
        "sampling",
    ),
    own(
        "multinomial-least-likely",
        "multinomial draws the token with the smallest weight",
        "multinomial",
        is_wide,
        least_likely,
        "sampling",
    ),
    own(
        "index-put-last-dropped",
        "index_put into a vector leaves out the last index",
        "index_put_",
        lambda call: all(len(operand.shape) == 1 for operand in call.operands[:2]),
        last_index_dropped,
        "sampling",
    ),
    own(
        "gather-row-shifted",
        "an index of several elements returns the elements before",
        "index",
        lambda call: len(call.operands[0].shape) == 1 and call.operands[1].shape[0] > 1,
        with_arguments(lambda x: x.roll(1, -1), 0),
        "sampling",
    ),
)
