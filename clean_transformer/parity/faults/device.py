"""The table of device faults.

`known` returns a fault that people have reported (see `KnownIssue`). `own` returns a fault that
nobody has reported.
"""

import torch
from torch import Tensor

from clean_transformer.parity.faults.corruptions import (
    SINGLE,
    Corruption,
    DeviceFault,
    alpha_ignored,
    as_if_contiguous,
    attending,
    batch_dependent,
    edge_tile_zeroed,
    first_columns_repeated,
    first_entry_filled,
    from_storage_start,
    half_accumulator,
    half_imprecise,
    half_statistics,
    own,
    past_the_end,
    rounded,
    rounded_scores,
    shifted,
    tanh_ignored,
    unmasked,
    with_arguments,
    with_factors,
    with_result,
)
from clean_transformer.parity.faults.generation import GENERATION_FAULTS
from clean_transformer.parity.faults.gradients import GRADIENT_FAULTS, half_of_gains
from clean_transformer.parity.faults.latent import LATENT_FAULTS
from clean_transformer.parity.faults.sizes import SIZE_FAULTS
from clean_transformer.parity.operations.call import Call
from clean_transformer.parity.operations.conditions import factors, is_dtype, n_columns, n_rows
from clean_transformer.parity.operations.known_issue import HALF
from clean_transformer.parity.operations.known_issues import KNOWN_ISSUES


def known(
    name: str, corrupt: Corruption, first_call_only: bool = False, use: str = "forward"
) -> DeviceFault:
    """Return a fault that emulates the entry called `name` in the table KNOWN_ISSUES.

    The fault has the operations and the condition of this entry. `corrupt` computes the wrong
    result. The other arguments are fields of `DeviceFault`.
    """
    (row,) = (fault for fault in KNOWN_ISSUES if fault.name == name)
    return DeviceFault(
        name,
        row.description,
        row.operations,
        row.matches,
        corrupt,
        first_call_only,
        use,
        row.devices,
    )


def _adds_expanded(call: Call) -> bool:
    return len(call.operands) == 2 and 0 in call.operands[1].stride


def _adds_streams(call: Call) -> bool:
    shapes = [operand.shape for operand in call.operands]
    return is_dtype(call, torch.float32) and len(shapes[0]) == 3 and shapes[1:] == shapes[:1]


def _least_integer(result: Tensor) -> Tensor:
    return torch.full_like(result, torch.iinfo(torch.int64).min)


DEVICE_FAULTS = (
    known("sdpa-short-transposed-query", with_arguments(as_if_contiguous, 0)),
    known("sdpa-many-keys-half", attending(lambda q, k, n: (k > q) | ((k >= n - 32) & (k > 0)))),
    known("sdpa-bf16-mask", unmasked, use=SINGLE),
    known("sdpa-mask-rocm", unmasked, use=SINGLE),
    known("sdpa-strided-values-rocm", with_arguments(as_if_contiguous, 2), use=SINGLE),
    known("sdpa-bf16-arm", rounded_scores, use=SINGLE),
    known("sdpa-causal-leak", attending(lambda q, k, n: k > q + 3)),
    known("sdpa-permuted-inputs", with_arguments(as_if_contiguous, 0, 1, 2)),
    known("matmul-columns-past-1024", with_result(first_columns_repeated)),
    known("matmul-1024-rows", with_result(lambda product: product.roll(1, -2))),
    known("matmul-many-terms", with_result(shifted), use=SINGLE),
    known("half-product-xpu", with_result(torch.zeros_like), use=SINGLE),
    known("half-product-alpha-ignored", alpha_ignored, use=SINGLE),
    known("bmm-permuted-key", with_factors(as_if_contiguous, left=False)),
    known("linear-noncontiguous-weight", with_factors(as_if_contiguous, left=False)),
    known("gelu-noncontiguous-input", with_arguments(as_if_contiguous, 0), use=SINGLE),
    known("layer-norm-storage-offset", with_arguments(from_storage_start, 0), use=SINGLE),
    known("layer-norm-gain-gradient-rocm", half_of_gains, use="training"),
    known("softmax-past-power-of-two-xpu", with_result(shifted), use=SINGLE),
    known("embedding-sliced-ids", with_arguments(from_storage_start, 1), use=SINGLE),
    known("where-noncontiguous-condition", with_arguments(as_if_contiguous, 0), use=SINGLE),
    known("multinomial-out-of-range", past_the_end, use=SINGLE),
    known("multinomial-int64-min", with_result(_least_integer), use="sampling"),
    known("multinomial-token-zero", with_result(torch.zeros_like), use="sampling"),
    known("argmax-int64-min", with_result(_least_integer), use="sampling"),
    known("first-call-imprecise", with_result(half_imprecise), first_call_only=True),
    known("matmul-tf32", with_factors(rounded(10))),
    own(
        "matmul-bf16-inputs",
        "float32 products round their inputs to bfloat16's 7 mantissa bits",
        "mm addmm bmm baddbmm linear",
        lambda call: is_dtype(call, torch.float32),
        with_factors(rounded(7)),
    ),
    own(
        "matmul-batch-dependent",
        "rows after the first 8 are less precise, so that an input's result depends on its batch",
        "mm addmm",
        lambda call: is_dtype(call, torch.float32) and n_rows(call) > 8,
        batch_dependent,
    ),
    own(
        "matmul-edge-tile",
        "the columns after the last whole tile of 16 stay zero",
        "mm addmm linear",
        lambda call: n_columns(call) > 16 and n_columns(call) % 16 > 0,
        with_result(edge_tile_zeroed),
    ),
    own(
        "matmul-half-accumulator",
        "half-precision products keep their running total in half precision",
        "mm addmm bmm",
        lambda call: is_dtype(call, *HALF) and factors(call)[0].shape[-1] > 8,
        half_accumulator,
    ),
    own(
        "embedding-ids-past-32767",
        "token ids are read as 15 bits",
        "embedding",
        lambda call: call.operands[0].shape[0] > 2**15,
        with_arguments(lambda ids: ids & 0x7FFF, 1),
    ),
    own(
        "residual-add-low-bits",
        "the sum of two residual streams keeps 12 mantissa bits",
        "add",
        _adds_streams,
        with_result(rounded(12)),
    ),
    own(
        "add-broadcast-operand",
        "an addition reads an expanded second operand as if contiguous",
        "add",
        _adds_expanded,
        with_arguments(as_if_contiguous, 1),
        SINGLE,
    ),
    own(
        "softmax-unnormalized",
        "the rows of a softmax add up to 1.001",
        "_softmax",
        lambda call: True,
        with_result(lambda pattern: pattern * (1 + 2**-10)),
        "hooks",
    ),
    own(
        "masked-fill-first-entry",
        "a mask shared by the batch is applied to its first entry alone",
        "masked_fill",
        lambda call: (
            len(call.operands[1].shape) < len(call.operands[0].shape)
            and call.operands[0].shape[0] > 1
        ),
        first_entry_filled,
        "hooks",
    ),
    own(
        "gelu-tanh-ignored",
        "GELU computes the exact form where the tanh form is asked for",
        "gelu",
        lambda call: ("approximate", "tanh") in call.options,
        tanh_ignored,
    ),
    own(
        "layer-norm-half-statistics",
        "layer_norm takes mean and variance in half precision, where a square overflows",
        "native_layer_norm",
        lambda call: is_dtype(call, *HALF),
        half_statistics,
    ),
    *SIZE_FAULTS,
    *LATENT_FAULTS,
    *GENERATION_FAULTS,
    *GRADIENT_FAULTS,
)
