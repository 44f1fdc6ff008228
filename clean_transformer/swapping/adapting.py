"""Adds the arguments `kv_cache` and `positions` to swapped modules whose `forward` lacks them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clean_transformer.kv_cache import LayerCache
from clean_transformer.modules.contract import accepts
from clean_transformer.support.stand_in import Method, StandIn


def adapted(kind: str, module: nn.Module) -> list[StandIn]:
    """Replace the module's `forward` if it lacks a keyword argument that the model passes.

    The model passes `kv_cache` to attentions and blocks, and `positions` to position embeddings.
    `kind` is the kind of the module, such as "attn" or "block". Returns a list with the `StandIn`
    that replaces `forward`, or an empty list if `forward` is not replaced. `StandIn.restore` puts
    the old `forward` back.
    """
    if kind in ("attn", "block") and not accepts(module, "kv_cache"):
        return [StandIn(module, "forward", WithCache)]
    if kind == "pos_embed" and not accepts(module, "positions"):
        return [StandIn(module, "forward", WithPositions)]
    return []


class WithCache:
    """Adds the argument `kv_cache` to the `forward` of an attention or a block.

    The cache stores the module's inputs instead of keys and values. In every forward pass, the
    module runs again on the inputs of all positions so far. This is slower than a cache of keys and
    values, but gives the correct output for any module.
    """

    def __init__(self, forward: Method):
        self.forward = forward

    def __call__(
        self, *inputs: Float[Tensor, "batch new ..."], kv_cache: LayerCache | None = None
    ) -> Float[Tensor, "batch new d_model"]:
        """Return the output for the positions in `inputs`, which are not in the cache yet."""
        if kv_cache is None:
            return self.forward(*inputs)
        # The cache stores tensors [batch pos head d_head]. Here, the inputs are stacked along the
        # head axis, and the last axis is d_model. If each input has a head axis of its own, the
        # stack and this axis are merged into one axis.
        new = torch.stack(inputs, dim=2)
        merged = new.flatten(2, -2)
        kept = kv_cache.append(merged, merged)[0]
        so_far = kept.reshape(*kept.shape[:2], *new.shape[2:]).unbind(dim=2)
        batch, n_new = inputs[0].shape[:2]
        mask = kv_cache.mask(n_new)
        if mask is None:
            return self.forward(*so_far)[:, -n_new:]
        # The module does not take a padding mask. So the module runs on one input of the batch at a
        # time, without this input's padding.
        output = inputs[0].new_zeros(batch, n_new, inputs[0].shape[-1])
        for row, is_token in enumerate(mask[:, 0, -1].expand(batch, -1)):
            of_row = self.forward(*(x[row, is_token][None] for x in so_far))[0, -n_new:]
            output[row, n_new - len(of_row) :] = of_row
        return output


class WithPositions:
    """Adds the argument `positions` to the `forward` of a position embedding.

    The module embeds all positions from 0 to the largest entry of `positions`. The result has only
    the embeddings of `positions`.
    """

    def __init__(self, forward: Method):
        self.forward = forward

    def __call__(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the embeddings of `positions`. The default is 0, 1, 2, … for every input."""
        if positions is None:
            return self.forward(tokens)
        from_the_first = tokens.new_zeros(1, int(positions.max()) + 1)
        return self.forward(from_the_first)[0, positions]
