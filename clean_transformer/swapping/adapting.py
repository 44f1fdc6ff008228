"""Makes a module that knows of no KV cache, or of no positions, callable with them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clean_transformer.kv_cache import LayerCache
from clean_transformer.modules.contract import accepts
from clean_transformer.support.stand_in import Method, StandIn


def adapted(kind: str, module: nn.Module) -> list[StandIn]:
    """Stand-ins for `forward`, already in place, with which a module takes every optional argument.

    `kind` is a key of `CONTRACT`. The list is empty for a module that takes them by itself.
    Parameters, hook points and the module's path stay as they are.
    """
    if kind in ("attn", "block") and not accepts(module, "kv_cache"):
        return [StandIn(module, "forward", WithCache)]
    if kind == "pos_embed" and not accepts(module, "positions"):
        return [StandIn(module, "forward", WithPositions)]
    return []


class WithCache:
    """A `forward` that takes `kv_cache`, made of one that does not.

    The cache stores the inputs instead of keys and values, and the module runs again on all inputs
    so far. That is slower, and right for whatever the module computes from earlier positions.
    """

    def __init__(self, forward: Method):
        self.forward = forward

    def __call__(
        self, *inputs: Float[Tensor, "batch new ..."], kv_cache: LayerCache | None = None
    ) -> Float[Tensor, "batch new d_model"]:
        """The outputs for the new positions."""
        if kv_cache is None:
            return self.forward(*inputs)
        # Several inputs, or inputs per head, are merged in the axis that keys have for heads.
        new = torch.stack(inputs, dim=2)
        merged = new.flatten(2, -2)
        kept = kv_cache.append(merged, merged)[0]
        so_far = kept.reshape(*kept.shape[:2], *new.shape[2:]).unbind(dim=2)
        batch, n_new = inputs[0].shape[:2]
        mask = kv_cache.mask(n_new)
        if mask is None:
            return self.forward(*so_far)[:, -n_new:]
        # The module knows of no padding either, so each row runs alone, without its padding.
        output = inputs[0].new_zeros(batch, n_new, inputs[0].shape[-1])
        for row, is_token in enumerate(mask[:, 0, -1].expand(batch, -1)):
            of_row = self.forward(*(x[row, is_token][None] for x in so_far))[0, -n_new:]
            output[row, n_new - len(of_row) :] = of_row
        return output


class WithPositions:
    """A position embedding's `forward` that takes `positions`, made of one that does not.

    The module embeds all positions from 0 to the largest, and the wanted ones are picked.
    """

    def __init__(self, forward: Method):
        self.forward = forward

    def __call__(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The embeddings of the positions, from 0 on unless given."""
        if positions is None:
            return self.forward(tokens)
        from_the_first = tokens.new_zeros(1, int(positions.max()) + 1)
        return self.forward(from_the_first)[0, positions]
