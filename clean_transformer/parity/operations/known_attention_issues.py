"""The device faults in attention that people have reported, for the table in `known_issues.py`."""

import torch

from clean_transformer.parity.operations.attention import ATTENTIONS
from clean_transformer.parity.operations.conditions import has_mask, is_causal, is_contiguous
from clean_transformer.parity.operations.diagnosis import Cause
from clean_transformer.parity.operations.known_issue import ARM, HALF, ROCM, KnownIssue

# The issues with the narrowest conditions come first, because `match` keeps this order.
ATTENTION_ISSUES = (
    KnownIssue(
        "sdpa-short-transposed-query",
        "attention of at most 8 transposed queries with d_head 64 reads them as if contiguous",
        ATTENTIONS,
        lambda call: (
            call.operands[0].shape[-2] <= 8
            and call.operands[0].shape[-1] == 64
            and not is_contiguous(call, 0)
        ),
        ("mps",),
        "pytorch#163597",
        "Call .contiguous() on the queries.",
        cause=Cause.LAYOUT,
        since="2.8.0",
    ),
    KnownIssue(
        "sdpa-many-keys-half",
        "the two-pass attention over 1,024 keys or more is wrong in half precision",
        ATTENTIONS,
        lambda call: call.operands[1].shape[-2] >= 1024,
        ("mps",),
        "pytorch#174861",
        "Use float32, or at most 1,023 keys.",
        fixed_in="2.11",
        dtypes=HALF,
    ),
    KnownIssue(
        "sdpa-bf16-mask",
        "bfloat16 attention with a mask is wrong",
        ATTENTIONS,
        has_mask,
        ("cuda",),
        "pytorch#108503",
        "Use is_causal instead of a mask, or float32.",
        dtypes=(torch.bfloat16,),
    ),
    KnownIssue(
        "sdpa-mask-rocm",
        "float16 attention with a mask is wrong",
        ATTENTIONS,
        has_mask,
        (ROCM,),
        "pytorch#147460",
        "Use is_causal instead of a mask, or another backend of torch.nn.attention.sdpa_kernel.",
        since="2.6",
        fixed_in="2.7",
        dtypes=(torch.float16,),
    ),
    KnownIssue(
        "sdpa-strided-values-rocm",
        "bfloat16 attention reads non-contiguous values as if contiguous",
        ATTENTIONS,
        lambda call: is_contiguous(call, 0, 1) and not is_contiguous(call, 2),
        (ROCM,),
        "ROCm/pytorch#3230",
        "Call .contiguous() on the values.",
        cause=Cause.LAYOUT,
        dtypes=(torch.bfloat16,),
    ),
    KnownIssue(
        "sdpa-bf16-arm",
        "bfloat16 attention rounds more than in torch 2.11, as if it kept its scores in bfloat16",
        ATTENTIONS,
        lambda call: True,
        (ARM,),
        "pytorch#183809",
        "Use float32.",
        since="2.12",
        dtypes=(torch.bfloat16,),
    ),
    KnownIssue(
        "sdpa-causal-leak",
        "is_causal lets a query see up to 3 later tokens in half precision",
        ATTENTIONS,
        is_causal,
        ("mps",),
        "pytorch#195910",
        "Use float32, or pass an explicit mask.",
        fixed_in="2.13",
        dtypes=HALF,
    ),
    KnownIssue(
        "sdpa-permuted-inputs",
        "float32 attention reads permuted queries, keys or values as if contiguous",
        ATTENTIONS,
        lambda call: not is_contiguous(call, 0, 1, 2),
        ("mps",),
        "pytorch#181133",
        "Call .contiguous() on queries, keys and values.",
        cause=Cause.LAYOUT,
        dtypes=(torch.float32,),
    ),
)
