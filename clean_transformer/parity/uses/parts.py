"""The parts of a model, on the device and in float64, as a use calls them.

A part is called with what comes in and with a cache of one layer or None, and gives what goes out.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.modules.layer_norm import NORMALIZATIONS
from clean_transformer.parity.uses.table import Use
from clean_transformer.weights.table import State

Part = Callable[[Tensor, KVCache | None], Tensor]


def run(
    use: Use, part: Part, inputs: Sequence[Tensor], cache_class: type[KVCache] = KVCache
) -> list[Tensor]:
    """What the part gives in each call of the use, with one cache for all of them."""
    cache = on_device(use.cache(cache_class), inputs[0].device)
    outputs = []
    for number, given in enumerate(inputs):
        outputs.append(part(given, cache))
        if cache is not None:
            cache.advance(given.shape[1])
            if number in use.selects:
                cache.select(torch.tensor(use.selects[number], device=given.device))
    return outputs


def on_device(cache: KVCache | None, device: torch.device) -> KVCache | None:
    """The empty cache, with its padding on that device."""
    if cache is not None and cache.padding is not None:
        cache.padding = cache.padding.to(device)
    return cache


def embed(model: DemoTransformer, tokens: Tensor, cache: KVCache | None) -> Tensor:
    """The residual stream before the first block."""
    positions = None if cache is None else cache.positions(tokens)
    return model.embed(tokens) + model.pos_embed(tokens, positions)


def block(module: nn.Module, residual: Tensor, cache: KVCache | None) -> Tensor:
    """The residual stream after one block."""
    if cache is None:
        return module(residual)
    cache.slots(residual.shape[1], residual.device)  # a static cache makes its slot
    return module(residual, kv_cache=cache.layers[0])


class ExactParts:
    """The parts in float64 on the CPU, made when they are asked for: one at a time is in memory.

    Their weights are those of `state`, rounded to `dtype` as the device has them.
    """

    def __init__(self, cfg: Config, state: State, dtype: torch.dtype):
        self.cfg, self.state, self.dtype = cfg, state, dtype

    def weight(self, name: str, rows: Tensor | slice = slice(None)) -> Tensor:
        """A parameter, or some of its rows, in float64."""
        return self.state[name][rows].to(self.dtype).double()

    def embeddings(self, tokens: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """The two terms of the residual stream before the first block."""
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        if cache is not None:
            positions = cache.positions(tokens)
        return self.weight("embed.W_E", tokens), self.weight("pos_embed.W_pos", positions)

    def block(self, layer: int) -> Part:
        """One block."""
        return partial(block, self._filled(TransformerBlock, f"blocks.{layer}."))

    def ln_final(self) -> nn.Module:
        """The last LayerNorm."""
        return self._filled(NORMALIZATIONS[self.cfg.normalization_type], "ln_final.")

    def unembedding(self) -> tuple[Tensor, Tensor]:
        """W_U [d_model d_vocab] and b_U [d_vocab]."""
        if "unembed.W_U" in self.state:
            return self.weight("unembed.W_U"), self.weight("unembed.b_U")
        return self.weight("embed.W_E").T, self.weight("unembed.b_U")

    def _filled(self, kind: Callable[[Config], nn.Module], prefix: str) -> nn.Module:
        with torch.device("meta"):
            module = kind(self.cfg)
        names = [name for name in self.state if name.startswith(prefix)]
        weights = {name.removeprefix(prefix): self.weight(name) for name in names}
        module.load_state_dict(weights, assign=True)
        return module
