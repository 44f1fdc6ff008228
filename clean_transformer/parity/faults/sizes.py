"""Device faults that affect only calls on tensors of certain sizes, for example with one row.

Real devices have such faults, because they choose kernels by the sizes of a call. So a device can
read short texts correctly, and still be wrong for long texts or in generation.
"""

from torch import Tensor

from clean_transformer.parity.faults.corruptions import (
    always,
    own,
    shifted,
    with_arguments,
    with_result,
)
from clean_transformer.parity.operations.attention import ATTENTIONS
from clean_transformer.parity.operations.call import Call
from clean_transformer.parity.operations.conditions import factors, n_columns, n_rows

PRODUCTS = "mm addmm linear"
ATTENTION = " ".join(ATTENTIONS)
SHIFTED = with_result(shifted)


def unembeds(call: Call) -> bool:
    """Whether a matrix product x W has a W with over 8 times as many columns as rows, like W_U."""
    return n_columns(call) > 8 * factors(call)[0].shape[-1]


def n_queries(call: Call) -> int:
    """The number of queries of an attention call."""
    return call.operands[0].shape[-2]


def n_keys(call: Call) -> int:
    """The number of keys of an attention call."""
    return call.operands[1].shape[-2]


def has_padding_mask(call: Call) -> bool:
    """Whether an attention call has a mask [batch 1 query key], as for padded texts."""
    masks = [operand.shape for operand in call.operands[3:]]
    return any(len(shape) == 4 and shape[1] == 1 for shape in masks)


def zero_past_64(sums: Tensor) -> Tensor:
    """Set the positions from 64 on to 0, in a tensor [batch pos d_model]."""
    kept = sums.clone()
    kept[:, 64:] = 0
    return kept


SIZE_FAULTS = (
    own(
        "unembedding-1-row",
        "the logits of a single row are those of the token before",
        PRODUCTS,
        lambda call: unembeds(call) and n_rows(call) == 1,
        SHIFTED,
        "generate",
    ),
    own(
        "unembedding-past-100-rows",
        "the logits of more than 100 rows are those of the token before",
        PRODUCTS,
        lambda call: unembeds(call) and n_rows(call) > 100,
        SHIFTED,
        "long text",
    ),
    own(
        "matmul-3-to-7-rows",
        "products of 3 to 7 rows have their columns shifted",
        PRODUCTS,
        lambda call: 3 <= n_rows(call) <= 7,
        SHIFTED,
        "generate",
    ),
    own(
        "matmul-10-to-30-rows",
        "products of 10 to 30 rows have their columns shifted",
        PRODUCTS,
        lambda call: 10 <= n_rows(call) <= 30,
        SHIFTED,
        "generate",
    ),
    own(
        "matmul-67-to-1000-rows",
        "products of 67 to 1,000 rows have their columns shifted",
        PRODUCTS,
        lambda call: 67 <= n_rows(call) <= 1000,
        SHIFTED,
        "generate",
    ),
    own(
        "sdpa-1-query-many-keys",
        "attention of one query over 34 to 1,000 keys has its columns shifted",
        ATTENTION,
        lambda call: n_queries(call) == 1 and 34 <= n_keys(call) <= 1000,
        SHIFTED,
        "generate",
    ),
    own(
        "sdpa-40-to-1000-queries",
        "attention of 40 to 1,000 queries has its columns shifted",
        ATTENTION,
        lambda call: 40 <= n_queries(call) <= 1000,
        SHIFTED,
        "generate",
    ),
    own(
        "sdpa-batch-past-2",
        "attention of more than 2 texts at once has its columns shifted",
        ATTENTION,
        lambda call: call.operands[0].shape[0] > 2,
        SHIFTED,
        "generate",
    ),
    own(
        "sdpa-padding-mask",
        "attention with a mask [batch 1 query key] has its columns shifted",
        ATTENTION,
        has_padding_mask,
        SHIFTED,
        "unequal batch",
    ),
    own(
        "embedding-row-0",
        "the row of token 0 is read as that of token 1",
        "embedding",
        always,
        with_arguments(lambda ids: ids.clamp(min=1), 1),
    ),
    own(
        "add-positions-past-64",
        "the sum of two streams [batch pos d_model] is 0 from position 64 on",
        "add",
        lambda call: len(call.operands[0].shape) == 3 and call.operands[0].shape[1] > 64,
        with_result(zero_past_64),
        "long text",
    ),
)
