"""Rules for the ATen operations of the backward pass: the exact gradients, with their scale G.

The exact gradients come from formulas made of sums, products, exp, tanh and erf. So a fused
gradient kernel of PyTorch that is also wrong in float64 is found. In the formulas, g is the
gradient with respect to the operation's output, and p is a softmax pattern.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from clean_transformer.parity.limits import (
    ATTEND,
    ELEMENTWISE,
    GELU,
    LAYER_NORM,
    SOFTMAX,
    SUM,
    Size,
    square,
    sum_scale,
)
from clean_transformer.parity.operations.attention import attention, attention_arguments
from clean_transformer.parity.operations.replay import Call64, Expected
from clean_transformer.parity.operations.rules import (
    Rule,
    approximate,
    equal,
    rows,
    within,
)
from clean_transformer.parity.oracle import ACCUMULATOR


def _of_softmax(call: Call64) -> list[Expected | None]:
    """The rule for the gradient of softmax, p (g − Σ g p)."""
    g, p, dim = (call.named[name] for name in ("grad_output", "output", "dim"))
    total = (g * p).sum(dim, keepdim=True)
    size = sum_scale(total, lambda size: size(g * p).sum(dim, keepdim=True), call.u)
    return [within(SOFTMAX, call, p * (g - total), p * (g.abs() + size), _along(g, dim))]


def _of_log_softmax(call: Call64) -> list[Expected | None]:
    """The rule for the gradient of log-softmax, g − p Σ g, with p = exp(output)."""
    g, log_p, dim = (call.named[name] for name in ("grad_output", "output", "dim"))
    p, total = log_p.exp(), g.sum(dim, keepdim=True)
    size = sum_scale(total, lambda size: size(g).sum(dim, keepdim=True), call.u)
    return [within(SOFTMAX, call, g - p * total, g.abs() + p * size, _along(g, dim))]


def _along(x: Tensor, dim: int) -> int:
    return x.shape[dim] if x.ndim else 1


def _of_gelu(call: Call64) -> list[Expected | None]:
    """The rule for the gradient of GELU: g (½(1 + t) + ½x dt/dx), with t = tanh(…) or erf(x/√2).

    dt/dx of tanh has the factor 1 − t², which kernels compute with the error u. There is no such
    error where t rounds to ±1. Rounding the argument a of tanh changes 1 − t² by 2u|a| (1 − t²).
    """
    g, x = call.named["grad_output"], call.named["self"]
    if call.named["approximate"] == "tanh":
        root = math.sqrt(2 / math.pi)
        inner = root * (x + 0.044715 * x * x * x)
        t, slope = inner.tanh(), root * (1 + 3 * 0.044715 * x * x)
        rest = 1 / inner.clamp(-350, 350).cosh().square()
        # Kernels for half precision compute 1 − t² in float32.
        u = min(call.u, ACCUMULATOR)
        cancelled = (16 * rest / u).clamp(max=1.0) * u / call.u
        size = slope * (rest * (1 + 2 * inner.abs()) + cancelled)
    else:
        t, slope = (x / math.sqrt(2)).erf(), math.sqrt(2 / math.pi)
        rest = (-x * x / 2).exp()
        size = slope * rest * (1 + x * x)
    exact = g / 2 * (1 + t + torch.where(rest == 0, 0.0, x * slope * rest))
    scale = g.abs() / 2 * (1 + t.abs() + torch.where(rest == 0, 0.0, x.abs() * size))
    return [within(GELU, call, exact, scale)]


def _of_layer_norm(call: Call64) -> list[Expected | None]:
    """The rule for the gradients of LayerNorm with respect to its input, gain and bias.

    With n = (x − mean)/σ and h = g · gain, the gradients are (h − mean h − n mean(h n))/σ, Σ g n
    and Σ g. The sums Σ run over all rows. n is a difference; the size of its terms is
    (|x| + |mean|)/σ.
    """
    g, x, mean, reciprocal = (call.named[name] for name in ("grad_out", "input", "mean", "rstd"))
    weight, wanted = call.named["weight"], call.named["output_mask"]
    axes = tuple(range(-len(call.named["normalized_shape"]), 0))
    rows_axes = tuple(range(x.ndim + axes[0]))
    normalized, size = (x - mean) * reciprocal, (x.abs() + mean.abs()) * reciprocal
    h = g if weight is None else g * weight

    def average(values: Tensor) -> Tensor:
        return values.mean(axes, keepdim=True)

    exact = reciprocal * (h - average(h) - normalized * average(h * normalized))
    scale = reciprocal * (h.abs() + average(h.abs()) + size * average(h.abs() * size))
    of_input = within(LAYER_NORM, call, exact, scale)

    def of_parameter(factor: Tensor, factor_size: Tensor) -> Expected:
        def over_rows(values: Tensor) -> Tensor:
            return values.sum(rows_axes) if rows_axes else values

        def terms(change: Size) -> Tensor:
            return over_rows(change(g) * change(factor_size))

        exact = over_rows(g * factor)
        n_rows = math.prod(x.shape[: len(rows_axes)])
        return _running_total(call, exact, terms, n_rows)

    ones = torch.ones_like(x)
    outputs = (of_input, of_parameter(normalized, size), of_parameter(ones, ones))
    return [output if asked else None for output, asked in zip(outputs, wanted, strict=True)]


def _of_attention(call: Call64) -> list[Expected | None]:
    """The rule for the gradients of attention with respect to q, k and v.

    The gradients are dv = pᵀ g, dq = scale · ds k and dk = scale · dsᵀ q, with the gradient
    ds = p (g vᵀ − Σ g · out) of the scores. `out` is the output of the device. With dropout, or if
    several query heads share a head of keys, nothing is compared.
    """
    named = call.named
    if named["dropout_p"] or named["query"].shape[-3] != named["key"].shape[-3]:
        return [None]
    g: Tensor = named["grad_out" if "grad_out" in named else "grad_out_"]
    mask = named.get("attn_mask", named.get("attn_bias"))
    q, k, v, mask, factor = attention_arguments(named | {"attn_mask": mask})
    out = named["out"]
    _, p = attention(q, k, v, mask, factor)
    scores = q.abs() @ k.abs().mT * abs(factor)
    if mask.dtype != torch.bool:
        scores = scores + torch.where(mask.isinf(), 0.0, mask.abs())
    # A score with the error u S changes p by the relative error u (S + Σ p S).
    spread = 1 + scores + (p * scores).sum(-1, keepdim=True)
    of_pattern = g @ v.mT - (g * out).sum(-1, keepdim=True)
    ds = p * of_pattern
    size = p * (
        spread * of_pattern.abs() + g.abs() @ v.abs().mT + (g * out).abs().sum(-1, keepdim=True)
    )

    def summed_over(left: Tensor, left_size: Tensor, right: Tensor, factor: float) -> Expected:
        def terms(change: Size) -> Tensor:
            return change(factor) * ((left_size if change is abs else square(left)) @ change(right))

        exact = factor * (left @ right)
        scale = sum_scale(exact, terms, call.u)
        return within(ATTEND, call, exact, scale, max(p.shape[-2:]))

    return [
        summed_over(ds, size, k, factor),
        summed_over(ds.mT, size.mT, q, factor),
        summed_over(p.mT, (p * spread).mT, g, 1.0),
    ]


def _running_total(
    call: Call64, exact: Tensor, terms: Callable[[Size], Tensor], n_terms: int
) -> Expected:
    """What is expected of a sum whose running total a kernel may keep in half precision.

    In half precision, each of the k additions then rounds the running total, with a random error
    of about u/√3 of its size. If the terms t have random signs, the total after i terms is about
    √i t, and the errors add up to √(k/6) √Σt². If all terms have the same sign, the total is i t,
    and the errors add up to (√k/3) |sum|. G is larger by both.
    """
    scale = sum_scale(exact, terms, call.u)
    if call.u > ACCUMULATOR:
        scale = scale + math.sqrt(n_terms) / 3 * exact.abs()
        scale = scale + math.sqrt(n_terms / 6) * terms(square).sqrt()
    return within(SUM, call, exact, scale, n_terms)


def _of_embedding(call: Call64) -> list[Expected | None]:
    """The rule for the gradient of an embedding: each row sums the gradients of its tokens."""
    indices = call.named["indices"].flatten()
    most = int(indices.bincount().max()) if len(indices) else 0
    return [_running_total(call, call.run(), call.run, most)]


def _accumulated(call: Call64) -> list[Expected | None]:
    """The rule for operations that write values at indices, and may add the values up.

    If an index occurs k times, the sum there has k + 1 terms. k is at most the number of indices.
    """
    if not call.named.get("accumulate", True) or not call.u:
        return equal(call)
    given = call.named["indices"] if "indices" in call.named else [call.named["index"]]
    n_terms = 1 + max(index.numel() for index in given if index is not None)
    return [_running_total(call, call.run(), call.run, n_terms)]


def _nll_loss(call: Call64) -> list[Expected | None]:
    """The rule for the mean or sum of −log p[target], and for the total weight of the targets."""
    exact, total = call.run()
    n_terms = call.named["target"].numel()
    scale = sum_scale(exact, lambda size: _loss_terms(call, size, total), call.u)
    of_total = within(SUM, call, total, total.abs(), n_terms)
    return [within(SUM, call, exact, scale, n_terms), of_total]


def _loss_terms(call: Call64, size: Size, total: Tensor) -> Tensor:
    # A mean divides by the total weight once. The squares of its terms are divided twice.
    divided = total if size is square and call.named["reduction"] == 1 else torch.ones(())
    return call.run(size)[0].abs() / divided


_of_product = approximate(ELEMENTWISE, lambda call, y: y.abs())

BACKWARD: dict[str, Rule] = {
    **rows("slice_backward select_backward threshold_backward", equal),
    **rows("nll_loss_forward", _nll_loss),
    **rows("nll_loss_backward native_dropout_backward", _of_product),
    **rows("_softmax_backward_data", _of_softmax),
    **rows("_log_softmax_backward_data", _of_log_softmax),
    **rows("gelu_backward", _of_gelu),
    **rows(
        "tanh_backward",
        approximate(
            ELEMENTWISE,
            lambda call, _: call.named["grad_output"].abs() * (1 + call.named["output"].square()),
        ),
    ),
    **rows("native_layer_norm_backward", _of_layer_norm),
    **rows("embedding_dense_backward", _of_embedding),
    **rows("index_put _index_put_impl _unsafe_index_put index_add scatter_add", _accumulated),
    **rows(
        "_scaled_dot_product_flash_attention_for_cpu_backward "
        "_scaled_dot_product_flash_attention_backward "
        "_scaled_dot_product_efficient_attention_backward "
        "_scaled_dot_product_cudnn_attention_backward "
        "_scaled_dot_product_fused_attention_overrideable_backward",
        _of_attention,
    ),
}
