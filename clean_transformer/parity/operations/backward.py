"""Rules for the ATen operations of a backward pass: the exact gradients and the allowed errors.

A rule returns an `Expected` (exact value and allowed error) for each output of a call. The file
`norms.py` has the gradients of LayerNorm and of similar norms.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from clean_transformer.parity.limits import ATTEND, ELEMENTWISE, GELU, SOFTMAX, SUM
from clean_transformer.parity.operations.attention import (
    attention,
    attention_arguments,
    score_sizes,
)
from clean_transformer.parity.operations.replay import Call64, Expected
from clean_transformer.parity.operations.rules import (
    Rule,
    approximate,
    equal,
    rows,
    within,
)
from clean_transformer.parity.oracle import ACCUMULATOR
from clean_transformer.parity.scales import Size, square, sum_scale


def _of_softmax(call: Call64) -> list[Expected | None]:
    """Return the exact gradient of softmax, p (g − Σ g p), and the allowed error.

    p is the output of the softmax, and g is the gradient with respect to p.
    """
    g, p, dim = (call.named[name] for name in ("grad_output", "output", "dim"))
    total = (g * p).sum(dim, keepdim=True)
    size = sum_scale(total, lambda size: size(g * p).sum(dim, keepdim=True), call.u)
    return [within(SOFTMAX, call, call.run(), p * (g.abs() + size), _along(g, dim))]


def _of_log_softmax(call: Call64) -> list[Expected | None]:
    """Return the exact gradient of log-softmax, g − p Σ g, and the allowed error.

    p is exp(output), and g is the gradient with respect to the output.
    """
    g, log_p, dim = (call.named[name] for name in ("grad_output", "output", "dim"))
    p, total = log_p.exp(), g.sum(dim, keepdim=True)
    size = sum_scale(total, lambda size: size(g).sum(dim, keepdim=True), call.u)
    return [within(SOFTMAX, call, call.run(), g.abs() + p * size, _along(g, dim))]


def _along(x: Tensor, dim: int) -> int:
    return x.shape[dim] if x.ndim else 1


def _of_gelu(call: Call64) -> list[Expected | None]:
    """Return the exact gradient of GELU, g (½(1 + t) + ½x dt/dx), and the allowed error.

    g is the gradient with respect to the output. t is tanh(√(2/π)(x + 0.044715x³)) or erf(x/√2).
    """
    g, x = call.named["grad_output"], call.named["self"]
    if call.named["approximate"] == "tanh":
        root = math.sqrt(2 / math.pi)
        inner = root * (x + 0.044715 * x * x * x)
        t, slope = inner.tanh(), root * (1 + 3 * 0.044715 * x * x)
        rest = 1 / inner.clamp(-350, 350).cosh().square()
        # dt/dx has the factor 1 − t². Two rounding errors change this factor. Kernels compute the
        # difference 1 − t² with an error of about u, unless t rounds to ±1. And rounding the
        # argument a of the tanh changes 1 − t² by 2u|a| (1 − t²). Kernels for half precision
        # compute 1 − t² in float32.
        u = min(call.u, ACCUMULATOR)
        cancelled = (16 * rest / u).clamp(max=1.0) * u / call.u
        size = slope * (rest * (1 + 2 * inner.abs()) + cancelled)
    else:
        t, slope = (x / math.sqrt(2)).erf(), math.sqrt(2 / math.pi)
        rest = (-x * x / 2).exp()
        size = slope * rest * (1 + x * x)
    scale = g.abs() / 2 * (1 + t.abs() + torch.where(rest == 0, 0.0, x.abs() * size))
    return [within(GELU, call, call.run(), scale)]


def _of_attention(call: Call64) -> list[Expected | None]:
    """Return the exact gradients of attention for q, k and v, and the allowed errors.

    The gradients are dv = pᵀ g, dq = scale · ds k and dk = scale · dsᵀ q. p is the attention
    pattern, g is the gradient with respect to the output, and ds = p (g vᵀ − Σ g · out) is the
    gradient with respect to the scores. `out` is the output that the device computed, and Σ is a
    sum over d_head. If several query heads share a head of keys, dk and dv are sums over these
    heads. If the call has dropout, the result is [None], and nothing is compared.
    """
    named = call.named
    if named["dropout_p"]:
        return [None]
    n_heads = named["key"].shape[-3]
    g: Tensor = named["grad_out" if "grad_out" in named else "grad_out_"]
    mask = named.get("attn_mask", named.get("attn_bias"))
    q, k, v, mask, factor = attention_arguments(named | {"attn_mask": mask})
    out = named["out"]
    _, p = attention(q, k, v, mask, factor)
    scores = score_sizes(q, k, mask, factor)
    # S is `scores`. A score with the error u S changes p by the relative error u (S + Σ p S).
    spread = 1 + scores + (p * scores).sum(-1, keepdim=True)
    of_pattern = g @ v.mT - (g * out).sum(-1, keepdim=True)
    ds = p * of_pattern
    size = p * (
        spread * of_pattern.abs() + g.abs() @ v.abs().mT + (g * out).abs().sum(-1, keepdim=True)
    )

    def summed_over(
        left: Tensor, left_size: Tensor, right: Tensor, factor: float, n_heads: int
    ) -> Expected:
        def over_heads(values: Tensor) -> Tensor:
            *batch, _, pos, d_head = values.shape
            return values.reshape(*batch, n_heads, -1, pos, d_head).sum(-3)

        def terms(change: Size) -> Tensor:
            sizes = left_size if change is abs else square(left)
            return over_heads(change(factor) * (sizes @ change(right)))

        exact = over_heads(factor * (left @ right))
        scale = sum_scale(exact, terms, call.u)
        n_terms = max(p.shape[-2:]) * (p.shape[-3] // n_heads)
        return within(ATTEND, call, exact, scale, n_terms)

    return [
        summed_over(ds, size, k, factor, p.shape[-3]),
        summed_over(ds.mT, size.mT, q, factor, n_heads),
        summed_over(p.mT, (p * spread).mT, g, 1.0, n_heads),
    ]


def running_total(
    call: Call64, exact: Tensor, terms: Callable[[Size], Tensor], n_terms: int
) -> Expected:
    """Return an `Expected` for a sum whose running total a kernel may round to half precision.

    `exact` is the exact sum. `terms(abs)` returns Σ|t|, and `terms(square)` returns Σt², for the
    `n_terms` terms t of the sum. In half precision, the allowed error is larger than for other
    sums.
    """
    scale = sum_scale(exact, terms, call.u)
    if call.u > ACCUMULATOR:
        # Each of the k additions rounds the running total, with a random error of about u/√3 of the
        # total. If all terms have the same sign, the total after i terms is i times a term, and the
        # errors add up to (√k/3) |sum|. If the terms have random signs, the total is about √i times
        # a term, and the errors add up to √(k/6) √Σt². G contains both sums of errors.
        scale = scale + math.sqrt(n_terms) / 3 * exact.abs()
        scale = scale + math.sqrt(n_terms / 6) * terms(square).sqrt()
    return within(SUM, call, exact, scale, n_terms)


def _of_embedding(call: Call64) -> list[Expected | None]:
    """Return the exact gradient of an embedding matrix, and the allowed error.

    Each row of the gradient belongs to a token id. It is the sum of the gradients at all positions
    with this token id.
    """
    indices = call.named["indices"].flatten()
    most = int(indices.bincount().max()) if len(indices) else 0
    return [running_total(call, call.run(), call.run, most)]


def _of_convolution(call: Call64) -> list[Expected | None]:
    """Return the exact gradients of a convolution for input, weight and bias, and allowed errors.

    The result has None for a gradient that the call does not ask for.
    """
    named, run = call.named, cache(call.run)
    weight = named["weight"]
    channels = weight.shape[1] if named["transposed"] else weight.shape[0] // named["groups"]
    n_places = max(named[key].numel() // named[key].shape[1] for key in ("input", "grad_output"))
    n_terms = (channels * math.prod(weight.shape[2:]), n_places, n_places)

    def of_output(number: int, exact: Tensor) -> Expected:
        scale = sum_scale(exact, lambda size: run(size)[number], call.u)
        return within(SUM, call, exact, scale, n_terms[number])

    outputs = enumerate(call.run())
    return [None if exact is None else of_output(number, exact) for number, exact in outputs]


def _accumulated(call: Call64) -> list[Expected | None]:
    """Return the exact result of `index_put` or a similar operation, and the allowed error.

    Such an operation writes values at indices of a tensor, or adds values to the elements there. If
    values are added k times at the same index, the sum has k + 1 terms. The allowed error assumes
    the largest possible k, which is the number of all indices.
    """
    if not call.named.get("accumulate", True) or not call.u:
        return equal(call)
    given = call.named["indices"] if "indices" in call.named else [call.named["index"]]
    n_terms = 1 + max(index.numel() for index in given if index is not None)
    return [running_total(call, call.run(), call.run, n_terms)]


def _nll_loss(call: Call64) -> list[Expected | None]:
    """Return the exact loss, the exact total weight of its targets, and the allowed errors.

    The loss is the mean or the sum of −log p[target].
    """
    exact, total = call.run()
    n_terms = call.named["target"].numel()
    scale = sum_scale(exact, lambda size: _loss_terms(call, size, total), call.u)
    of_total = within(SUM, call, total, total.abs(), n_terms)
    return [within(SUM, call, exact, scale, n_terms), of_total]


def _loss_terms(call: Call64, size: Size, total: Tensor) -> Tensor:
    # The squared terms of a mean must be divided by the squared total weight, but `run` divides by
    # the total weight only once.
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
    **rows("convolution_backward", _of_convolution),
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
