"""Changes the memory order of weights, but not their values or shapes, for faster products."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.modules.attention import Attention


def merge_heads(
    attn: Attention, transposed: bool
) -> tuple[Float[Tensor, "d_model qkv"], Float[Tensor, "qkv"]]:
    """Return one weight and one bias that compute the queries, keys and values of all heads.

    The weight is W [d_model qkv] and the bias is b [qkv], where qkv is 3·head·d_head. W_Q, W_K and
    W_V of `attn` become views of W, and b_Q, b_K and b_V become views of b. W is column-major in
    memory if `transposed`, and row-major otherwise.

    The weights are not copied if W_Q, W_K and W_V are already views of one tensor in this memory
    order. This is true after an earlier call with the same `transposed`. If `transposed` is False,
    it is also true after GPT-2's checkpoint was loaded.
    """
    weights, biases = (attn.W_Q, attn.W_K, attn.W_V), (attn.b_Q, attn.b_K, attn.b_V)
    b = torch.stack([bias.data for bias in biases])
    for bias, part in zip(biases, b, strict=True):
        bias.data = part
    if (merged := side_by_side(weights, transposed)) is not None:
        return merged, b.flatten()
    n_heads, d_model, d_head = attn.W_Q.shape
    if transposed:
        W = attn.W_Q.data.new_empty(3, n_heads, d_head, d_model).permute(3, 0, 1, 2)
    else:
        W = attn.W_Q.data.new_empty(d_model, 3, n_heads, d_head)
    parts = rearrange(W, "d_model part head d_head -> part head d_model d_head")
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part.copy_(weight.data)
    return W.flatten(start_dim=1), b.flatten()


def side_by_side(
    weights: Sequence[Float[Tensor, "head d_model d_head"]], transposed: bool
) -> Float[Tensor, "d_model qkv"] | None:
    """Return one view that contains `weights` (W_Q, W_K and W_V), or None if there is no such view.

    The view is column-major if `transposed`, and row-major otherwise. There is no such view if the
    weights are not next to each other in memory, or if they have another memory order.
    """
    first = weights[0].data
    n_heads, d_model, d_head = first.shape
    width = n_heads * d_head
    if transposed:
        strides, apart, merged = (d_head * d_model, 1, d_model), width * d_model, (1, d_model)
    else:
        strides, apart, merged = (d_head, 3 * width, 1), width, (3 * width, 1)
    lies_so = first.stride() == strides and all(
        W.stride() == strides
        and W.untyped_storage() is first.untyped_storage()
        and W.storage_offset() == first.storage_offset() + part * apart
        for part, W in enumerate(weights)
    )
    return first.as_strided((d_model, 3 * width), merged) if lies_so else None


def lay_out(parameter: nn.Parameter, transposed: bool) -> None:
    """Give `parameter` a new memory order: row-major, or column-major if `transposed`.

    With more than two axes, column-major means that the last axis is the outermost in memory.
    """
    given = parameter.data
    parameter.data = (
        given.movedim(-1, 0).contiguous().movedim(0, -1) if transposed else given.contiguous()
    )
