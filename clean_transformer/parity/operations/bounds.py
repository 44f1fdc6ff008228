"""Computes the exact outputs and the allowed errors for a call of any ATen operation.

The exact outputs are computed in float64 from the inputs that the device had. The table RULES maps
the name of an operation to its rule: a function that returns an `Expected` (exact value and allowed
error) for each output of a call.
"""

import math
from functools import partial

import torch
from torch import Tensor

from clean_transformer.parity.limits import (
    ADD,
    ATTEND,
    CONVOLUTION,
    ELEMENTWISE,
    GELU,
    LINEAR,
    SUM,
)
from clean_transformer.parity.operations.attention import (
    ATTENTIONS,
    attention,
    attention_arguments,
    score_sizes,
)
from clean_transformer.parity.operations.backward import BACKWARD
from clean_transformer.parity.operations.norms import NORMS
from clean_transformer.parity.operations.onednn import linear_pointwise
from clean_transformer.parity.operations.optimizer import OPTIMIZER
from clean_transformer.parity.operations.replay import Call64, Expected
from clean_transformer.parity.operations.rules import (
    Rule,
    approximate,
    convolution_terms,
    equal,
    factor_length,
    length,
    reduced,
    rows,
    smooth,
    summed,
    unknown,
    unless_integer,
    within,
)
from clean_transformer.parity.operations.softmaxes import SOFTMAXES
from clean_transformer.parity.scales import (
    attention_squares,
    attention_terms,
    gelu_scale,
    sum_scale,
    typical_size,
)


def expected_outputs(call: Call64) -> list[Expected | None] | None:
    """Return the exact value and the allowed error of each output of the call.

    The list has None for an output that is not compared. If the call cannot be checked at all, the
    result is None instead of a list. This happens if the operation draws random numbers (except
    `multinomial`), if it cannot run in float64 on the CPU, or if its result depends on the memory
    layout of its tensors, as for `as_strided`.
    """
    if call.name in RULES:
        return RULES[call.name](call)
    if call.name.startswith("_foreach_"):
        return _for_each(call)
    if torch.Tag.nondeterministic_seeded in call.func.tags or call.name in UNCHECKED:
        return None
    try:
        return unknown(call) if call.u else equal(call)
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def _for_each(call: Call64) -> list[Expected | None] | None:
    """Return the exact outputs of a `_foreach_` operation, and the allowed errors.

    Such an operation runs on lists of tensors. Each position in the lists is treated like a call of
    the operation for single tensors.
    """
    name = call.name.removeprefix("_foreach_")
    name = {"norm": "linalg_vector_norm"}.get(name, name)
    operation, outputs = getattr(torch.ops.aten, name), []
    for number in range(max(len(arg) for arg in call.args if isinstance(arg, (list, tuple)))):
        args = [arg[number] if isinstance(arg, (list, tuple)) else arg for arg in call.args]
        options = call.kwargs
        if name in ("addcmul", "addcdiv") and len(args) > 3:
            options = {**options, "value": float(args.pop())}
        overload = torch._C._jit_resolve_packet(f"aten::{name}", *args, **options)
        dtype = next(arg.dtype for arg in args if isinstance(arg, Tensor))
        func = getattr(operation, overload)
        expected = expected_outputs(Call64(func, tuple(args), options, dtype))
        if expected is None:
            return None
        outputs += expected
    return outputs


def _term(call: Call64, name: str) -> Tensor:
    # Return |x| for the operand x with this name. A Python number counts twice, because the device
    # first rounds the number to the dtype.
    value = call.named.get(name, 1)
    return value.abs() if isinstance(value, Tensor) else torch.tensor(2.0 * abs(value)).double()


def _sum_of_two(call: Call64, exact: Tensor) -> Tensor:
    alpha = abs(call.named.get("alpha", 1))
    return _term(call, "self") + _term(call, "other") * (alpha if alpha == 1 else 2 * alpha)


def _quotient(call: Call64, exact: Tensor) -> Tensor:
    mode = "floor" if call.name == "floor_divide" else call.named.get("rounding_mode")
    if mode is None:
        return exact.abs()
    # Rounding may move a quotient to the other side of an integer.
    quotient = torch.as_tensor(call.named["self"] / call.named["other"])
    ends = (quotient * (1 + sign * ELEMENTWISE.healthy * call.u) for sign in (1, -1))
    above, below = (torch.div(end, 1, rounding_mode=mode) for end in ends)
    return exact.abs() + (above - below).abs() / (ELEMENTWISE.healthy * call.u)


def _variance(call: Call64) -> list[Expected | None]:
    """Return the exact variance, and the allowed error."""
    exact, x = call.run(), call.named["self"]
    dim, keepdim = call.named.get("dim") or [*range(x.ndim)], call.named.get("keepdim", False)
    mean = x.mean(dim, keepdim=True)
    # The difference x − mean has the error u s. The term u s² is for equal x, whose difference is 0
    # but for this error.
    size = x.abs() + x.abs().mean(dim, keepdim=True)
    change = 2 * (x - mean).abs() * size + call.u * size.square()
    n_terms = reduced(call.named, exact)
    correction = call.named.get("correction", float(call.named.get("unbiased", True)))
    divided = n_terms - (1.0 if correction is None else correction)
    scale = exact + n_terms / divided * change.mean(dim, keepdim)
    return [within(SUM, call, exact, scale, n_terms)]


def _attention(call: Call64) -> list[Expected | None]:
    """Return fused attention's exact output, softmax(scale · q kᵀ + mask) v, and the allowed error.

    Other outputs of the operation, such as logsumexp and random seeds, are not compared. They are
    inputs of the backward pass. With dropout, the result is [None], and nothing is compared.
    """
    if call.named.get("dropout_p"):
        return [None]
    q, k, v, mask, factor = attention_arguments(call.named)
    # One head at a time is computed, because the scores of all heads need much memory.
    tensors = (q, k, v, mask.expand(*q.shape[:-1], k.shape[-2]))
    heads = [*zip(*(each.unbind(-3) for each in tensors), strict=True)]
    outputs, scales = [], []
    for q, k, v, mask in heads:
        exact, pattern = attention(q, k, v, mask, factor)
        size = score_sizes(q, k, mask, factor)
        outputs.append(exact)
        scales.append(sum_scale(exact, partial(attention_terms, pattern, size, v), call.u))

    def typical() -> Tensor:
        sizes = []
        for q, k, v, mask in heads:
            exact, pattern = attention(q, k, v, mask, factor)
            squares = attention_squares(pattern, q @ k.mT * factor, v)
            sizes.append(typical_size(exact, squares))
        return torch.stack(sizes, -3)

    exact, scale = torch.stack(outputs, -3), torch.stack(scales, -3)
    return [within(ATTEND, call, exact, scale, k.shape[-2], typical)]


def _at_indices(values: Tensor, dim: int, indices: Tensor) -> Tensor:
    # A faulty operation may return an index that is out of range. Return NaN for such an index.
    inside = (indices >= 0) & (indices < values.shape[dim])
    return torch.where(inside, values.gather(dim, indices.where(inside, 0)), math.nan)


def _largest(call: Call64) -> list[Expected | None]:
    """Return what `topk` or `sort` must return.

    The returned values must equal the exact values. The returned indices may differ from the exact
    indices, because equal values may come in any order. But the input's values at the returned
    indices must equal the exact values, and no index may occur twice.
    """
    values, _ = call.run()
    dim = call.named["dim"]

    def look_up(indices: Tensor) -> Tensor:
        values = _at_indices(call.named["self"], dim, indices)
        return values.masked_fill(_repeated(indices, dim), math.nan)

    return [Expected(values), Expected(values, observe=look_up)]


def _multinomial(call: Call64) -> list[Expected | None]:
    """Return the requirement for `multinomial`: every returned index has a weight above 0.

    Without replacement, no index may occur twice.
    """
    weights, wanted = call.named["self"], call.named["num_samples"]
    possible = torch.ones(*weights.shape[:-1], wanted, dtype=torch.bool)

    def is_possible(indices: Tensor) -> Tensor:
        allowed = _at_indices(weights, -1, indices) > 0
        return allowed if call.named["replacement"] else allowed & ~_repeated(indices, -1)

    return [Expected(possible, observe=is_possible)]


def _repeated(indices: Tensor, dim: int) -> Tensor:
    # Whether an index occurs twice along the axis.
    return (indices.sort(dim).values.diff(dim=dim) == 0).any(dim, keepdim=True)


RULES: dict[str, Rule] = {
    **rows(
        "view _unsafe_view _reshape_alias _reshape_copy reshape expand permute transpose t slice "
        "select unsqueeze squeeze unbind split split_with_sizes chunk narrow diagonal movedim "
        "flatten unflatten detach alias clone contiguous copy lift_fresh lift_fresh_copy _to_copy "
        "to cat stack repeat repeat_interleave flip roll embedding index index_select gather "
        "scatter index_copy index_fill masked_fill masked_select where tril triu "
        "ones zeros full ones_like zeros_like full_like new_ones new_zeros new_full "
        "arange scalar_tensor fill zero eq ne lt le gt ge argmax argmin max min amax amin aminmax "
        "maximum minimum neg abs relu sign clamp floor ceil trunc isnan isinf isfinite "
        "_local_scalar_dense",
        equal,
    ),
    **rows("topk sort", _largest),
    **rows("multinomial", _multinomial),
    **rows("add sub rsub", approximate(ADD, _sum_of_two)),
    **rows(
        "mul sqrt square reciprocal rsqrt tanh erf sigmoid pow",
        approximate(ELEMENTWISE, lambda call, y: y.abs()),
    ),
    **rows("div floor_divide", approximate(ELEMENTWISE, _quotient)),
    **rows("exp", approximate(ELEMENTWISE, lambda call, y: y * (1 + call.named["self"].abs()))),
    **rows("log", approximate(ELEMENTWISE, lambda call, y: 1 + y.abs())),
    **rows(
        "sin cos tan asin acos atan sinh cosh expm1 exp2 log1p log2 log10 erfc silu softplus elu",
        unless_integer(smooth),
    ),
    **rows("mm matmul dot mv linear", summed(LINEAR, factor_length)),
    **rows("addmm", summed(LINEAR, length("mat1"))),
    "_linear_pointwise": linear_pointwise,
    # `bmm` may multiply an attention pattern by values. Then all terms may have the same sign.
    **rows("bmm", summed(SUM, factor_length)),
    **rows("baddbmm", summed(SUM, length("batch1"))),
    **rows("convolution", summed(CONVOLUTION, convolution_terms)),
    **rows("sum mean", summed(SUM, reduced)),
    **rows("cumsum", summed(SUM, lambda named, exact: named["self"].shape[named["dim"]])),
    **rows(
        "gelu",
        approximate(
            GELU, lambda call, _: gelu_scale(call.named["self"], call.named["approximate"])
        ),
    ),
    **rows("var", unless_integer(_variance)),
    **dict.fromkeys(ATTENTIONS, _attention),
    **SOFTMAXES,
    **NORMS,
    **BACKWARD,
    **OPTIMIZER,
}

# The operations that multiply matrices. Autocast runs these operations in the autocast dtype.
PRODUCTS = frozenset(
    ["mm", "matmul", "dot", "mv", "linear", "addmm", "bmm", "baddbmm", *ATTENTIONS]
)

# Operations whose result is not compared: they return uninitialized memory, the id of a kernel, or
# a handle of the profiler.
WITHOUT_VALUES = frozenset(
    [
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        *("_fused_sdp_choice", "_record_function_enter_new", "_record_function_exit"),
    ]
)

# Operations whose result depends on a tensor's storage. The replay has only a copy of the values.
UNCHECKED = frozenset(["as_strided", "set", "resize", "as_strided_scatter"])
