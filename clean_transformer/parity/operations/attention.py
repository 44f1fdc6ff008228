"""Computes attention with matrix products and a softmax, without PyTorch's fused kernels."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# All ATen operations that compute scaled-dot-product attention.
ATTENTIONS = frozenset(
    {
        "scaled_dot_product_attention",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_attention_math_for_mps",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    }
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    normalize: Callable[[Tensor], Tensor] = lambda scores: scores.softmax(-1),
) -> tuple[Tensor, Tensor]:
    """Return (pattern @ v, pattern), with pattern = normalize(scale * q @ k^T + mask)."""
    # A query whose keys are all masked has a pattern of zeros, as in PyTorch's own kernels since
    # `_safe_softmax` was added in PyTorch 2.5. Before, its pattern was NaN.
    # A boolean mask is True where a query sees a key. The docstring does not say this, because
    # reproduction scripts contain the docstring and must be short.
    scores = scale * (q @ k.transpose(-2, -1))
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    pattern = normalize(scores)
    if hasattr(torch.ops.aten, "_safe_softmax"):
        pattern = pattern.masked_fill(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)
    return pattern @ v, pattern


def score_sizes(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return scale * |q| @ |k|^T + |mask|, but without the infinite elements of the mask."""
    size = q.abs() @ k.abs().mT * abs(scale)
    return size if mask.dtype == torch.bool else size + mask.abs().masked_fill(mask.isinf(), 0.0)


def attention_arguments(named: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Convert the arguments of a fused call to the arguments (q, k, v, mask, scale) of `attention`.

    `named` maps the names of the fused call's arguments, such as "query", to their values. If
    several query heads share a head of keys and values, this head is repeated in k and v, once for
    each of these query heads. If `is_causal` is True, query i sees the keys 0 to i, as PyTorch
    documents. If the call has no mask, the returned mask is a tensor with the single number 0.
    """
    q, k, v = (named[name] for name in ("query", "key", "value"))
    if k.shape[-3] != q.shape[-3]:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    mask = named.get("attn_mask")
    mask = named.get("attn_bias") if mask is None else mask
    if named.get("is_causal"):
        # If there are more keys than queries, our `causal_mask` differs: its last query sees all
        # keys.
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    elif mask is None:
        mask = torch.zeros((), dtype=q.dtype, device=q.device)
    scale = named.get("scale")
    return q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale
