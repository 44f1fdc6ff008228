"""Attention in small steps: the one reference that replays, planted faults and scripts share."""

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

# Every name that PyTorch has for scaled-dot-product attention below autograd.
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
    """normalize(scale * q k^T + mask) v, and the pattern. A boolean mask is True for seen keys."""
    scores = scale * (q @ k.transpose(-2, -1))
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    pattern = normalize(scores)
    return pattern @ v, pattern


def attention_source() -> str:
    """The source of `attention` without its types, for a script that imports torch alone."""
    tree = ast.parse(inspect.getsource(attention))
    function = cast(ast.FunctionDef, tree.body[0])
    function.returns = None
    for argument in function.args.args:
        argument.annotation = None
    return ast.unparse(tree)


def attention_arguments(named: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """What `attention` takes, from the named arguments of a call of any of ATTENTIONS.

    Keys and values that several heads share are repeated. A causal mask is aligned with the first
    query and the first key, as PyTorch documents it; our own `causal_mask` with the last ones.
    """
    q, k, v = (named[name] for name in ("query", "key", "value"))
    if k.shape[-3] != q.shape[-3]:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    mask = named.get("attn_mask")
    mask = named.get("attn_bias") if mask is None else mask
    if named.get("is_causal"):
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    elif mask is None:
        mask = torch.zeros((), dtype=q.dtype, device=q.device)
    scale = named.get("scale")
    return q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale
