"""The order of weights in memory that large products want; their values and shapes stay."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from clean_transformer.modules.attention import Attention


def merge_heads(attn: Attention, transposed: bool) -> tuple[Tensor, Tensor]:
    """All heads' queries, keys and values as one W [d_model 3·head·d_head] and one b.

    The parameters become views of them. Weights from GPT-2's checkpoint are so already, and are
    not copied.
    """
    weights, biases = (attn.W_Q, attn.W_K, attn.W_V), (attn.b_Q, attn.b_K, attn.b_V)
    b = torch.stack([bias.data for bias in biases])
    for bias, part in zip(biases, b, strict=True):
        bias.data = part
    if not transposed and (merged := side_by_side(weights)) is not None:
        return merged, b.flatten()
    order = "part head d_head d_model" if transposed else "d_model part head d_head"
    given = torch.stack([W.data for W in weights])
    W = rearrange(given, f"part head d_model d_head -> {order}").contiguous()
    for weight, part in zip(
        weights, rearrange(W, f"{order} -> part head d_model d_head"), strict=True
    ):
        weight.data = part
    return rearrange(W, f"{order} -> d_model (part head d_head)"), b.flatten()


def side_by_side(weights: Sequence[Tensor]) -> Tensor | None:
    """The three as one [d_model 3·head·d_head], a view, if they lie side by side in memory."""
    first = weights[0].data
    n_heads, d_model, d_head = first.shape
    width = n_heads * d_head
    lies_so = first.stride() == (d_head, 3 * width, 1) and all(
        W.stride() == first.stride()
        and W.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and W.storage_offset() == first.storage_offset() + part * width
        for part, W in enumerate(weights)
    )
    return first.as_strided((d_model, 3 * width), (3 * width, 1)) if lies_so else None


def lay_out(parameter: nn.Parameter, transposed: bool) -> None:
    """Let its outputs, the last axis, be the first in memory or the last."""
    given = parameter.data
    parameter.data = (
        given.movedim(-1, 0).contiguous().movedim(0, -1) if transposed else given.contiguous()
    )
