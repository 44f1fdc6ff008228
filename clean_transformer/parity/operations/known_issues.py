"""A table of device faults that people have reported.

`match` in `leads.py` finds the faults in the table that may explain a wrong call.
"""

import torch

from clean_transformer.parity.operations.conditions import (
    alpha,
    beta,
    factors,
    has_unlike_strides,
    is_contiguous,
    is_transposed,
    n_columns,
    n_rows,
    n_terms,
)
from clean_transformer.parity.operations.diagnosis import Cause
from clean_transformer.parity.operations.known_attention_issues import ATTENTION_ISSUES
from clean_transformer.parity.operations.known_issue import ARM, HALF, ROCM, X86, KnownIssue

# The ATen operations that multiply matrices. Most devices run "linear" as "mm" or "addmm"; only
# some devices have their own kernel for "linear".
MATMUL = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear"})
BATCHED = frozenset({"bmm", "baddbmm"})
# For contiguous float32 tensors, the CPU computes these operations with MKL's vector math library.
VECTOR_MATH = frozenset(
    {"exp", "log", "sqrt", "tanh", "erf", "erfc", "expm1", "log1p", "sin", "cos", "asin", "acos"}
)
# The sizes at which torch-xpu-ops#4772 saw a wrong softmax. It does not tell the end of the last.
SOFTMAX_BANDS = ((257, 384), (513, 896), (1025, 1400))
FUSED_OPTIMIZERS = frozenset({"_fused_adamw_", "_fused_adam_", "_fused_sgd_", "_fused_adagrad_"})


# The issues with the narrowest conditions come first, because `match` keeps this order.
KNOWN_ISSUES = (
    *ATTENTION_ISSUES,
    KnownIssue(
        "matmul-columns-past-1024",
        "of more than 32,768 columns only the first 1,024 are right",
        MATMUL,
        lambda call: n_columns(call) > 2**15,
        ("mps",),
        "pytorch#116769",
        "Multiply by blocks of columns.",
        since="2.1",
    ),
    KnownIssue(
        "matmul-1024-rows",
        "a product of exactly 1,024 rows is wrong",
        MATMUL,
        lambda call: n_rows(call) == 1024,
        ("mps",),
        "pytorch#116331",
        "Use at most 1,023 tokens.",
        since="2.1",
    ),
    KnownIssue(
        "matmul-many-terms",
        "sums of 32,767 terms or more, as in the unembedding's gradient, read past the end",
        MATMUL - BATCHED,
        lambda call: n_terms(call) >= 2**15 - 1 and min(n_rows(call), n_columns(call)) >= 16,
        ("mps",),
        "pytorch#193487, pytorch#153957, M1 and M2",
        "Multiply by blocks of terms.",
        since="2.7",
        fixed_in="2.14",
        dtypes=(torch.float32,),
    ),
    KnownIssue(
        "half-product-xpu",
        "products with a large matrix are zero, NaN or garbage in half precision",
        MATMUL,
        lambda call: n_terms(call) * n_columns(call) >= 2**18,
        ("xpu",),
        "torch-xpu-ops#5220, compute-runtime#1000, Arc Battlemage",
        "Use float32.",
        since="2.8",
        dtypes=HALF,
    ),
    KnownIssue(
        "half-product-alpha-ignored",
        "a float16 product of one row with a transposed matrix ignores alpha if beta is 0",
        frozenset({"addmm", "baddbmm"}),
        lambda call: (
            n_rows(call) == 1
            and is_transposed(factors(call)[1])
            and alpha(call) != 1
            and beta(call) == 0
        ),
        (ARM,),
        "pytorch#136299",
        "Call .contiguous() on the matrix.",
        cause=Cause.LAYOUT,
        since="2.4",
        fixed_in="2.5",
        dtypes=(torch.float16,),
    ),
    KnownIssue(
        "bmm-permuted-key",
        "a batched product reads a permuted second factor, as in q·kᵀ, as if contiguous",
        BATCHED,
        lambda call: not factors(call)[1].is_contiguous,
        ("mps",),
        "pytorch#78511",
        "Call .contiguous() on the keys.",
        cause=Cause.LAYOUT,
        since="1.12",
    ),
    KnownIssue(
        "linear-noncontiguous-weight",
        "a product reads a non-contiguous weight as if contiguous",
        MATMUL - BATCHED,
        lambda call: not factors(call)[1].is_contiguous,
        ("mps",),
        "pytorch#161640",
        "Call .contiguous() on the weight.",
        cause=Cause.LAYOUT,
        since="2.8.0",
        fixed_in="2.9",
    ),
    KnownIssue(
        "gelu-noncontiguous-input",
        "GELU reads a non-contiguous input as if contiguous",
        frozenset({"gelu"}),
        lambda call: not is_contiguous(call, 0),
        ("mps",),
        "pytorch#98212, transformers#32005",
        "Call .contiguous() on the input.",
        cause=Cause.LAYOUT,
    ),
    KnownIssue(
        "layer-norm-storage-offset",
        "layer_norm of a slice reads from the start of the storage",
        frozenset({"native_layer_norm", "layer_norm"}),
        lambda call: call.operands[0].storage_offset > 0,
        ("mps",),
        "pytorch#131750",
        "Call .clone() on the slice.",
        cause=Cause.LAYOUT,
    ),
    KnownIssue(
        "layer-norm-gain-gradient-rocm",
        "half of the gradients of LayerNorm's gain and bias are left out",
        frozenset({"native_layer_norm_backward"}),
        lambda call: True,
        (ROCM,),
        "pytorch#183861, RDNA",
        "Train on another device.",
        fixed_in="2.13",
    ),
    KnownIssue(
        "softmax-past-power-of-two-xpu",
        "the softmax of 257 to 384, 513 to 896, or just over 1,024 numbers is wrong",
        frozenset({"_softmax"}),
        lambda call: any(
            least <= call.operands[0].shape[-1] <= most for least, most in SOFTMAX_BANDS
        ),
        ("xpu",),
        "torch-xpu-ops#4772, Arc Battlemage",
        "Pad the numbers with -inf to a power of two.",
        dtypes=(torch.float32,),
    ),
    KnownIssue(
        "embedding-sliced-ids",
        "an embedding of sliced ids, as of the last tokens of a text, reads ids from its start",
        frozenset({"embedding"}),
        lambda call: call.operands[1].storage_offset > 0,
        ("mps",),
        "pytorch#95448",
        "Call .clone() on the ids.",
        cause=Cause.LAYOUT,
        since="1.13",
        fixed_in="2.0",
    ),
    KnownIssue(
        "where-noncontiguous-condition",
        "where reads a non-contiguous condition as if contiguous",
        frozenset({"where"}),
        lambda call: not is_contiguous(call, 0),
        ("mps",),
        "pytorch#150967, a nightly of torch 2.8",
        "Call .contiguous() on the condition.",
        cause=Cause.LAYOUT,
    ),
    KnownIssue(
        "multinomial-out-of-range",
        "sampling with replacement returns an index past the last category",
        frozenset({"multinomial"}),
        lambda call: True in call.arguments[1:] or dict(call.options).get("replacement") is True,
        ("mps",),
        "pytorch#136623",
        "Clamp the sample to the vocabulary, or sample on the CPU.",
    ),
    KnownIssue(
        "multinomial-int64-min",
        "multinomial returns -9223372036854775808",
        frozenset({"multinomial"}),
        lambda call: True,
        ("mps",),
        "pytorch#92752",
        "Sample on the CPU.",
        since="2.0",
    ),
    KnownIssue(
        "multinomial-token-zero",
        "multinomial returns index 0, so that all generated text is exclamation marks",
        frozenset({"multinomial"}),
        lambda call: True,
        ("mps",),
        "llm.c#36, nanoGPT#458",
        "Sample on the CPU.",
        since="2.2",
    ),
    KnownIssue(
        "argmax-int64-min",
        "argmax returns -9223372036854775808",
        frozenset({"argmax"}),
        lambda call: True,
        ("mps",),
        "pytorch#98191",
        "Take the argmax on the CPU.",
        since="2.0",
    ),
    KnownIssue(
        "first-call-imprecise",
        "the first call in a process is off by thousands of ulp in one thread's chunk",
        VECTOR_MATH,
        lambda call: is_contiguous(call, 0),
        (X86,),
        "pytorch#188792, MKL 2024.2",
        "Call the operation once on one thread before the work.",
        cause=Cause.FIRST_CALL,
        dtypes=(torch.float32,),
    ),
    KnownIssue(
        "fused-optimizer-layout",
        "a fused step on the CPU pairs a parameter and its gradient by their order in memory",
        FUSED_OPTIMIZERS,
        has_unlike_strides,
        (X86,),
        "torch 2.13.0+cpu, without a report; the kernels are from pytorch#123074",
        "Give the gradient the strides of its parameter, or use fused=False.",
        cause=Cause.LAYOUT,
        since="2.4",
    ),
    KnownIssue(
        "matmul-tf32",
        "float32 products round their inputs to TF32's 10 mantissa bits",
        MATMUL,
        lambda call: True,
        ("cuda",),
        "PyTorch numerical notes, TensorFloat-32",
        'Call torch.set_float32_matmul_precision("highest").',
        cause=Cause.TF32,
        dtypes=(torch.float32,),
    ),
)
