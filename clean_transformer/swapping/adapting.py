"""Adds the arguments `kv_cache` or `positions` to modules that do not take them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clean_transformer.kv_cache import LayerCache
from clean_transformer.modules.contract import accepts
from clean_transformer.support.stand_in import Method, StandIn


def adapted(kind: str, module: nn.Module) -> list[StandIn]:
    """Replace the module's `forward`, if needed, so that it takes `kv_cache` or `positions`.

    `kind` is a key of `CONTRACT`. Returns the stand-ins, which are already in place, or an empty
    list if the module already takes the argument. Parameters, hook points and the module's path
    stay the same.
    """
    if kind in ("attn", "block") and not accepts(module, "kv_cache"):
        return [StandIn(module, "forward", WithCache)]
    if kind == "pos_embed" and not accepts(module, "positions"):
        return [StandIn(module, "forward", WithPositions)]
    return []


class WithCache:
    """Adds the argument `kv_cache` to the `forward` of an attention or a block.

    The cache stores the inputs instead of keys and values, and the module runs again on all inputs
    so far. This is slower, but it is correct for any module.
    """

    def __init__(self, forward: Method):
        self.forward = forward

    def __call__(
        self, *inputs: Float[Tensor, "batch new ..."], kv_cache: LayerCache | None = None
    ) -> Float[Tensor, "batch new d_model"]:
        """The outputs for the new positions."""
        if kv_cache is None:
            return self.forward(*inputs)
        # The cache expects keys [batch pos head d_head]. So several inputs, or an input with a head
        # axis, are merged into the head axis.
        new = torch.stack(inputs, dim=2)
        merged = new.flatten(2, -2)
        kept = kv_cache.append(merged, merged)[0]
        so_far = kept.reshape(*kept.shape[:2], *new.shape[2:]).unbind(dim=2)
        batch, n_new = inputs[0].shape[:2]
        mask = kv_cache.mask(n_new)
        if mask is None:
            return self.forward(*so_far)[:, -n_new:]
        # The module does not take a padding mask. So each input runs alone, without its padding.
        output = inputs[0].new_zeros(batch, n_new, inputs[0].shape[-1])
        for row, is_token in enumerate(mask[:, 0, -1].expand(batch, -1)):
            of_row = self.forward(*(x[row, is_token][None] for x in so_far))[0, -n_new:]
            output[row, n_new - len(of_row) :] = of_row
        return output


class WithPositions:
    """Adds the argument `positions` to the `forward` of a position embedding.

    The module embeds all positions from 0 to the largest of `positions`. The embeddings of
    `positions` are then selected.
    """

    def __init__(self, forward: Method):
        self.forward = forward

    def __call__(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The embeddings of `positions`. By default, every input has the positions 0, 1, 2, …"""
        if positions is None:
            return self.forward(tokens)
        from_the_first = tokens.new_zeros(1, int(positions.max()) + 1)
        return self.forward(from_the_first)[0, positions]
