"""What each ATen operation may get wrong by rounding: its exact result and a scale G, elementwise.

An error is judged as |device - exact| / (u G + η), where `exact` is the operation in float64 on the
device's own inputs, u the unit roundoff of the result's dtype, and η its underflow (Higham,
Accuracy and Stability of Numerical Algorithms, 2nd ed., §2.2 and equation 2.8).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clean_transformer.parity.operations.replay import Call64, Expected
from clean_transformer.parity.operations.unfused import ATTENTIONS
from clean_transformer.parity.oracle import ACCUMULATOR

Rule = Callable[[Call64], list[Expected | None]]


def expected_outputs(call: Call64) -> list[Expected | None] | None:
    """What each output must be, `None` for an output that is not compared.

    `None` altogether where the call cannot be checked: it draws random numbers, has no meaning on
    the CPU, or its result is no function of its tensors' values.
    """
    if call.name in RULES:
        return RULES[call.name](call)
    if torch.Tag.nondeterministic_seeded in call.func.tags or call.name in UNCHECKED:
        return None
    try:
        return _equal(call) if not call.u else _unknown(call)
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def _equal(call: Call64) -> list[Expected | None]:
    return [Expected(torch.as_tensor(output)) for output in tree_leaves(call.run_as_given())]


def _approximate(healthy: float, wrong: float, scale: Callable[[Call64, Tensor], Tensor]) -> Rule:
    def rule(call: Call64) -> list[Expected | None]:
        exact = call.run()
        return [Expected(exact, scale(call, exact), None, healthy, wrong)]

    return _unless_integer(rule)


def _unless_integer(rule: Rule) -> Rule:
    return lambda call: rule(call) if call.u else _equal(call)


def _unknown(call: Call64) -> list[Expected | None]:
    exact = tree_leaves(call.run())
    absolute = tree_leaves(call.run(abs))
    return [
        Expected(value, value.abs() + of_absolute.abs(), None, 30.0, 300.0)
        for value, of_absolute in zip(exact, absolute, strict=True)
    ]


def _term(call: Call64, name: str) -> Tensor:
    # A Python number is first rounded to the dtype: that is one rounding more.
    value = call.named.get(name, 1)
    return value.abs() if isinstance(value, Tensor) else torch.tensor(2.0 * abs(value)).double()


def _sum_of_two(call: Call64, exact: Tensor) -> Tensor:
    alpha = abs(call.named.get("alpha", 1))
    return _term(call, "self") + _term(call, "other") * (alpha if alpha == 1 else 2 * alpha)


def _summed(terms: Callable[[dict[str, Any], Tensor], int]) -> Rule:
    """Σ aᵢbᵢ over k terms: |δ| ≤ γ_k Σ|aᵢ||bᵢ|, γ_k = ku / (1 - ku) (Higham, §3.1 and §3.5).

    Half precision is summed in float32 and rounded once or, in pieces, a few times: then G is
    |result| + √Σ(aᵢbᵢ)², plus the float32 bound. Beyond 8, the total was in half precision too.
    """

    def rule(call: Call64) -> list[Expected | None]:
        exact, absolute = call.run(), call.run(abs)
        summed = terms(call.named, exact)
        quadrature = call.run(lambda number: number * number).sqrt()
        if call.name == "mean":
            quadrature = quadrature / summed**0.5
        typical = exact.abs() + quadrature
        return [_accumulated(call.u, exact, absolute, typical, max(30.0, float(summed)), 8.0)]

    return _unless_integer(rule)


def _accumulated(
    u: float,
    exact: Tensor,
    absolute: Tensor,
    typical: Tensor,
    wrong: float,
    healthy_in_half: float = 30.0,
) -> Expected:
    if u <= ACCUMULATOR:
        return Expected(exact, absolute, typical, 30.0, wrong)
    return Expected(exact, typical + absolute * ACCUMULATOR / u, typical, healthy_in_half, 30.0)


def _softmax(call: Call64) -> list[Expected | None]:
    """p (1 + |s - max s|): rounding s - max s changes exp by that much, relatively.

    It bounds the sum of a row too, and is 0 where the pattern must be.
    """
    exact, scores = call.run(), call.named["self"]
    below_highest = (scores - scores.amax(call.named["dim"], keepdim=True)).abs()
    scale = torch.where(exact == 0, 0.0, exact * (1 + below_highest))
    return [Expected(exact, scale, None, 30.0, 300.0)]


def _log_softmax(call: Call64) -> list[Expected | None]:
    exact, scores = call.run(), call.named["self"]
    below_highest = (scores - scores.amax(call.named["dim"], keepdim=True)).abs()
    return [Expected(exact, 1 + below_highest + exact.abs(), None, 30.0, 300.0)]


def _layer_norm(call: Call64) -> list[Expected | None]:
    """|w| (|x| + mean|x|) / σ + |b|: the rounding of x - mean x, divided by σ.

    The mean's is mean|x|; 1/σ, from the centered c, (1 + mean(|c| (|x| + mean|x|)) / σ²) / σ.
    """
    exact = tree_leaves(call.run())
    x, weight, bias = (call.named[name] for name in ("input", "weight", "bias"))
    axes = tuple(range(-len(call.named["normalized_shape"]), 0))
    mean_size = x.abs().mean(axes, keepdim=True)
    variance = x.var(axes, correction=0, keepdim=True) + call.named["eps"]
    centered = (x - x.mean(axes, keepdim=True)).abs()
    rounding = (x.abs() + mean_size) / variance.sqrt()
    output = rounding if weight is None else rounding * weight.abs()
    output = output if bias is None else output + bias.abs()
    spread = (centered * rounding).mean(axes, keepdim=True) / variance.sqrt()
    scales = (output, mean_size, (1 + spread) / variance.sqrt())
    return [
        Expected(value, scale, None, 30.0, 300.0)
        for value, scale in zip(exact, scales, strict=False)
    ]


def _gelu(call: Call64, exact: Tensor) -> Tensor:
    x = call.named["self"]
    tanh_form = call.named["approximate"] == "tanh"
    inner = (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3) if tanh_form else x / 2**0.5
    return x.abs() / 2 * (1 + (inner.tanh() if tanh_form else inner.erf()).abs())


def _variance(call: Call64, exact: Tensor) -> Tensor:
    x = call.named["self"].abs()
    return exact + (x + x.mean()).square().amax()


def _attention(call: Call64) -> list[Expected | None]:
    """softmax(scale · q kᵀ + mask) v, for every dispatch name of scaled-dot-product attention.

    A causal mask is aligned top-left. G = Σⱼ pⱼ|vⱼ| (1 + Sⱼ + Σₗ pₗSₗ), S = |q||k|scale + |mask|:
    a score is off by u S, and δp = p (δs - Σₗ pₗδsₗ) to first order, so that
    |δpⱼ| ≤ u pⱼ (Sⱼ + Σₗ pₗSₗ), beside pⱼ's own rounding. A half-precision kernel rounds p and the
    result, and keeps scores in float32: there G is |z| + √Σ(pⱼvⱼ)², plus the float32 bound. The
    other outputs (logsumexp, seeds) serve a backward pass and are not compared.
    """
    if call.named.get("dropout_p"):
        return [None]
    q, k, v = (call.named[name] for name in ("query", "key", "value"))
    if k.shape[-3] != q.shape[-3]:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scale = call.named.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = _additive_mask(call.named, q.shape[-2], k.shape[-2])

    scores = q @ k.mT * scale
    pattern = (scores + mask).softmax(-1)
    exact = pattern @ v
    size = q.abs() @ k.abs().mT * abs(scale) + torch.where(mask.isinf(), 0.0, mask.abs())
    average = (pattern * size).sum(-1, keepdim=True)
    absolute = (pattern * (1 + size + average)) @ v.abs()
    rounded = pattern if call.u > ACCUMULATOR else pattern * (1 + scores.abs())
    typical = exact.abs() + (rounded.square() @ v.square()).sqrt()
    terms = q.shape[-1] + k.shape[-2]
    return [_accumulated(call.u, exact, absolute, typical, max(30.0, float(terms)))]


def _additive_mask(named: dict[str, Any], n_queries: int, n_keys: int) -> Tensor:
    mask = named.get("attn_mask")
    mask = named.get("attn_bias") if mask is None else mask
    if named.get("is_causal"):
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device="cpu").tril()
    if mask is None:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    return mask


def _at_indices(values: Tensor, dim: int, indices: Tensor) -> Tensor:
    # A faulty index may lie outside, where there is no value.
    inside = (indices >= 0) & (indices < values.shape[dim])
    return torch.where(inside, values.gather(dim, indices.where(inside, 0)), math.nan)


def _largest(call: Call64) -> list[Expected | None]:
    """Sorted values, and indices that lead to them: those of equal values may come in any order."""
    values, _ = call.run()
    dim = call.named["dim"]
    look_up = partial(_at_indices, call.named["self"], dim)
    return [Expected(values), Expected(values, observe=look_up)]


def _multinomial(call: Call64) -> list[Expected | None]:
    """Any index that has a probability above 0."""
    weights, wanted = call.named["self"], call.named["num_samples"]
    possible = torch.ones(*weights.shape[:-1], wanted, dtype=torch.bool)
    return [Expected(possible, observe=lambda indices: _at_indices(weights, -1, indices) > 0)]


def _length(name: str) -> Callable[[dict[str, Any], Tensor], int]:
    return lambda named, exact: named[name].shape[-1]


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
    **_rows("add sub rsub", _approximate(1.0, 2.0, _sum_of_two)),
    **_rows(
        "mul div sqrt square reciprocal rsqrt tanh erf sigmoid pow",
        _approximate(8.0, 64.0, lambda call, exact: exact.abs()),
    ),
    **_rows("exp", _approximate(8.0, 64.0, lambda call, y: y * (1 + call.named["self"].abs()))),
    **_rows("log", _approximate(8.0, 64.0, lambda call, y: 1 + y.abs())),
    **_rows(
        "mm bmm matmul dot mv linear",
        _summed(lambda named, exact: named["input" if "input" in named else "self"].shape[-1]),
    ),
    **_rows("addmm", _summed(_length("mat1"))),
    **_rows("baddbmm", _summed(_length("batch1"))),
    **_rows("sum mean", _summed(_reduced)),
    **_rows("cumsum", _summed(lambda named, exact: named["self"].shape[named["dim"]])),
    **_rows("_softmax softmax", _unless_integer(_softmax)),
    **_rows("_log_softmax log_softmax", _unless_integer(_log_softmax)),
    **_rows("native_layer_norm layer_norm", _layer_norm),
    **_rows("gelu", _approximate(16.0, 160.0, _gelu)),
    **_rows("var", _approximate(30.0, 300.0, _variance)),
    **dict.fromkeys(ATTENTIONS, _attention),
}


# There is no value in their result: memory that is not yet written, the number of a kernel.
WITHOUT_VALUES = frozenset(
    ["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_fused_sdp_choice"]
)


# Their result depends on the memory behind the tensor, which a copy of its values does not have.
UNCHECKED = frozenset(["as_strided", "set", "resize", "as_strided_scatter"])
