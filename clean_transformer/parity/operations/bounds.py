"""Computes the exact outputs, the error limits and the scale G of a call of any ATen operation.

The exact outputs are computed in float64 from the inputs that the device had. `parity/limits.py`
has the limits and the formulas for G. A rule is a function that computes all three for a call.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clean_transformer.parity.limits import (
    ADD,
    ATTEND,
    ELEMENTWISE,
    GELU,
    LAYER_NORM,
    LINEAR,
    OTHER,
    SOFTMAX,
    SUM,
    Kind,
    Size,
    attention_squares,
    attention_terms,
    gelu_scale,
    layer_norm_scales,
    softmax_scale,
    square,
    sum_scale,
    typical_size,
)
from clean_transformer.parity.operations.attention import (
    ATTENTIONS,
    attention,
    attention_arguments,
)
from clean_transformer.parity.operations.replay import Call64, Expected

Rule = Callable[[Call64], list[Expected | None]]


def expected_outputs(call: Call64) -> list[Expected | None] | None:
    """Return the exact value of each output of the call, with its limits and its scale G.

    The list has None for an output that is not compared. If the call cannot be checked at all,
    return None instead of a list. A call cannot be checked if the operation draws random numbers
    (except `multinomial`), does not exist on the CPU, or depends on more than its tensors' values.
    """
    if call.name in RULES:
        return RULES[call.name](call)
    if torch.Tag.nondeterministic_seeded in call.func.tags or call.name in UNCHECKED:
        return None
    try:
        return _unknown(call) if call.u else _equal(call)
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def _equal(call: Call64) -> list[Expected | None]:
    return [Expected(torch.as_tensor(output)) for output in tree_leaves(call.run_as_given())]


def _unknown(call: Call64) -> list[Expected | None]:
    """The rule for an operation f that is not in RULES: G is |f(inputs)| + |f(|inputs|)|."""
    pairs = zip(tree_leaves(call.run()), tree_leaves(call.run(abs)), strict=True)
    return [
        _within(OTHER, call, exact, exact.abs() + size.abs())
        if isinstance(exact, Tensor) and exact.is_floating_point()
        else Expected(torch.as_tensor(exact))
        for exact, size in pairs
    ]


def _within(
    kind: Kind,
    call: Call64,
    exact: Tensor,
    scale: Tensor,
    terms: int = 1,
    typical: Callable[[], Tensor] | None = None,
) -> Expected:
    healthy, wrong = kind.limits(terms, call.u)
    return Expected(exact, scale, typical, healthy, wrong)


def _unless_integer(rule: Rule) -> Rule:
    return lambda call: rule(call) if call.u else _equal(call)


def _approximate(kind: Kind, scale: Callable[[Call64, Tensor], Tensor]) -> Rule:
    """Return a rule for an operation with one output. `scale(call, exact output)` returns G."""

    def rule(call: Call64) -> list[Expected | None]:
        exact = call.run()
        return [_within(kind, call, exact, scale(call, exact))]

    return _unless_integer(rule)


def _summed(kind: Kind, count: Callable[[dict[str, Any], Tensor], int]) -> Rule:
    """Return a rule for an operation that sums terms or products.

    `count(named arguments, exact output)` returns the number of terms in each sum. The rule also
    runs the operation on the absolute values of its inputs: this gives Σ|term|, which G needs.
    """

    def rule(call: Call64) -> list[Expected | None]:
        exact = call.run()
        n_terms = count(call.named, exact)
        # The terms of a mean are x / n. Their squares are x² / n². But the mean of x² divides by n
        # only once, so `terms` divides by n again.
        divided = n_terms if call.name == "mean" else 1

        def terms(size: Size) -> Tensor:
            return call.run(size) / (divided if size is square else 1)

        def typical() -> Tensor:
            return typical_size(exact, terms(square))

        scale = sum_scale(exact, terms, call.u)
        return [_within(kind, call, exact, scale, n_terms, typical)]

    return _unless_integer(rule)


def _term(call: Call64, name: str) -> Tensor:
    # Returns |value| of the operand `name` of a sum. A Python number counts twice, because the
    # device first rounds the number to the dtype.
    value = call.named.get(name, 1)
    return value.abs() if isinstance(value, Tensor) else torch.tensor(2.0 * abs(value)).double()


def _sum_of_two(call: Call64, exact: Tensor) -> Tensor:
    alpha = abs(call.named.get("alpha", 1))
    return _term(call, "self") + _term(call, "other") * (alpha if alpha == 1 else 2 * alpha)


def _softmax(call: Call64) -> list[Expected | None]:
    exact, scores, dim = call.run(), call.named["self"], call.named["dim"]
    scale = softmax_scale(exact, scores, dim)
    return [_within(SOFTMAX, call, exact, scale, scores.shape[dim] if scores.ndim else 1)]


def _log_softmax(call: Call64) -> list[Expected | None]:
    """The rule for s − max s − log Σ exp(s − max s). As in softmax, all terms of Σ are positive."""
    exact, scores, dim = call.run(), call.named["self"], call.named["dim"]
    scale = 1 + (scores - scores.amax(dim, keepdim=True)).abs() + exact.abs()
    return [_within(SOFTMAX, call, exact, scale, scores.shape[dim] if scores.ndim else 1)]


def _layer_norm(call: Call64) -> list[Expected | None]:
    """The rule for the outputs of LayerNorm: the output with gain and bias, the mean, and 1/σ.

    An error δσ of σ changes 1/σ by δσ/σ². So G of 1/σ is G of σ, divided by σ².
    """
    x, weight, bias = (call.named[name] for name in ("input", "weight", "bias"))
    axes = tuple(range(-len(call.named["normalized_shape"]), 0))
    output, mean, sigma = layer_norm_scales(x, call.named["eps"], axes)
    output = output if weight is None else output * weight.abs()
    output = output if bias is None else output + bias.abs()
    outputs = tree_leaves(call.run())
    scales = (output, mean, *(sigma * reciprocal.square() for reciprocal in outputs[2:]))
    pairs = zip(outputs, scales, strict=False)
    return [_within(LAYER_NORM, call, exact, scale) for exact, scale in pairs]


def _variance(call: Call64, exact: Tensor) -> Tensor:
    x = call.named["self"].abs()
    return exact + (x + x.mean()).square().amax()


def _attention(call: Call64) -> list[Expected | None]:
    """The rule for all operations in ATTENTIONS: softmax(scale · q kᵀ + mask) v.

    Only the first output is compared, because the other outputs (logsumexp, seeds) are for the
    backward pass. With dropout, nothing is compared.
    """
    if call.named.get("dropout_p"):
        return [None]
    q, k, v, mask, factor = attention_arguments(call.named)
    exact, pattern = attention(q, k, v, mask, factor)
    size = q.abs() @ k.abs().mT * abs(factor)
    if mask.dtype != torch.bool:
        size = size + torch.where(mask.isinf(), 0.0, mask.abs())
    scale = sum_scale(exact, partial(attention_terms, pattern, size, v), call.u)

    def typical() -> Tensor:
        return typical_size(exact, attention_squares(pattern, q @ k.mT * factor, v))

    return [_within(ATTEND, call, exact, scale, k.shape[-2], typical)]


def _at_indices(values: Tensor, dim: int, indices: Tensor) -> Tensor:
    # A faulty operation may return an index that is out of range. Return NaN for such an index.
    inside = (indices >= 0) & (indices < values.shape[dim])
    return torch.where(inside, values.gather(dim, indices.where(inside, 0)), math.nan)


def _largest(call: Call64) -> list[Expected | None]:
    """The rule for `topk` and `sort`: the returned values must equal the exact values.

    The input's values at the returned indices must also equal the exact values, and no index may
    occur twice. The indices themselves are not compared, because the indices of equal values may
    come in any order.
    """
    values, _ = call.run()
    dim = call.named["dim"]

    def look_up(indices: Tensor) -> Tensor:
        repeated = (indices.sort(dim).values.diff(dim=dim) == 0).any(dim, keepdim=True)
        return _at_indices(call.named["self"], dim, indices).masked_fill(repeated, math.nan)

    return [Expected(values), Expected(values, observe=look_up)]


def _multinomial(call: Call64) -> list[Expected | None]:
    """The rule for `multinomial`: a drawn index is right if its weight is above 0."""
    weights, wanted = call.named["self"], call.named["num_samples"]
    possible = torch.ones(*weights.shape[:-1], wanted, dtype=torch.bool)
    return [Expected(possible, observe=lambda indices: _at_indices(weights, -1, indices) > 0)]


def _length(name: str) -> Callable[[dict[str, Any], Tensor], int]:
    return lambda named, exact: named[name].shape[-1]


def _factor_length(named: dict[str, Any], exact: Tensor) -> int:
    return named["input" if "input" in named else "self"].shape[-1]


def _reduced(named: dict[str, Any], exact: Tensor) -> int:
    return named["self"].numel() // max(exact.numel(), 1)


def _rows(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_rows(
        "view _unsafe_view _reshape_alias _reshape_copy reshape expand permute transpose t slice "
        "select unsqueeze squeeze unbind split split_with_sizes chunk narrow diagonal movedim "
        "flatten unflatten detach alias clone contiguous copy lift_fresh lift_fresh_copy _to_copy "
        "to cat stack repeat repeat_interleave flip roll embedding index index_select gather "
        "scatter index_put index_copy index_fill masked_fill masked_select where tril triu "
        "ones zeros full ones_like zeros_like full_like new_ones new_zeros new_full "
        "arange scalar_tensor fill zero eq ne lt le gt ge argmax argmin max min amax amin aminmax "
        "maximum minimum neg abs relu sign clamp isnan isinf isfinite _local_scalar_dense",
        _equal,
    ),
    **_rows("topk sort", _largest),
    **_rows("multinomial", _multinomial),
    **_rows("add sub rsub", _approximate(ADD, _sum_of_two)),
    **_rows(
        "mul div sqrt square reciprocal rsqrt tanh erf sigmoid pow",
        _approximate(ELEMENTWISE, lambda call, y: y.abs()),
    ),
    **_rows("exp", _approximate(ELEMENTWISE, lambda call, y: y * (1 + call.named["self"].abs()))),
    **_rows("log", _approximate(ELEMENTWISE, lambda call, y: 1 + y.abs())),
    **_rows("mm matmul dot mv linear", _summed(LINEAR, _factor_length)),
    **_rows("addmm", _summed(LINEAR, _length("mat1"))),
    # `bmm` may multiply an attention pattern by values. Then all terms of a sum can have one sign.
    **_rows("bmm", _summed(SUM, _factor_length)),
    **_rows("baddbmm", _summed(SUM, _length("batch1"))),
    **_rows("sum mean", _summed(SUM, _reduced)),
    **_rows("cumsum", _summed(SUM, lambda named, exact: named["self"].shape[named["dim"]])),
    **_rows("_softmax softmax", _unless_integer(_softmax)),
    **_rows("_log_softmax log_softmax", _unless_integer(_log_softmax)),
    **_rows("native_layer_norm layer_norm", _layer_norm),
    **_rows(
        "gelu",
        _approximate(
            GELU, lambda call, _: gelu_scale(call.named["self"], call.named["approximate"])
        ),
    ),
    **_rows("var", _approximate(OTHER, _variance)),
    **dict.fromkeys(ATTENTIONS, _attention),
}

# The operations that multiply matrices. Autocast runs these operations in the autocast dtype.
PRODUCTS = frozenset(
    ["mm", "matmul", "dot", "mv", "linear", "addmm", "bmm", "baddbmm", *ATTENTIONS]
)

# Operations whose result is not compared: they return uninitialized memory, or a kernel's id.
WITHOUT_VALUES = frozenset(
    ["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_fused_sdp_choice"]
)

# Operations whose result depends on a tensor's storage. The replay has only a copy of the values.
UNCHECKED = frozenset(["as_strided", "set", "resize", "as_strided_scatter"])
