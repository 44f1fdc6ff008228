"""Runs single parts of a model: the embeddings, a block, the last LayerNorm or the unembedding."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.hooks import HookedModule
from clean_transformer.kv_cache import KVCache, StaticKVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.modules.layer_norm import NORMALIZATIONS
from clean_transformer.parity.uses.table import Use
from clean_transformer.weights.table import State

# A function that runs one part of the model. Its arguments are the input of the part, and a KV
# cache with one layer, or None. It returns the output of the part.
Part = Callable[[Tensor, KVCache | None], Tensor]
# The unembedding is the largest weight. To save memory, only this many of its columns at a time are
# converted to float64.
COLUMNS = 2048


def run(
    use: Use, part: Part, inputs: Sequence[Tensor], cache_class: type[KVCache] = KVCache
) -> list[Tensor]:
    """Run one part of the model, such as a block, once for each tensor in `inputs`.

    Returns the outputs. In the use `use`, the model is called several times, and `inputs` has the
    input of the part in each call. If the use has a KV cache, all calls share one cache of the
    class `cache_class`. If `use.selects` lists texts for a call, the cache keeps only these texts
    after the call, as in beam search.
    """
    cache = on_device(use.cache(cache_class), inputs[0].device)
    outputs = []
    for number, given in enumerate(inputs):
        # As after `optimize(compile=True)`, only calls that read one token run compiled code.
        is_prefill = isinstance(cache, StaticKVCache) and given.shape[1] > 1
        with torch.compiler.set_stance("force_eager" if is_prefill else "default"):
            outputs.append(part(given, cache))
        if cache is not None:
            cache.advance(given.shape[1])
            if number in use.selects:
                cache.select(torch.tensor(use.selects[number], device=given.device))
    return outputs


def on_device(cache: KVCache | None, device: torch.device) -> KVCache | None:
    """Move the tensor `cache.padding` of a KV cache to `device`, and return the cache."""
    if cache is not None and cache.padding is not None:
        cache.padding = cache.padding.to(device)
    return cache


def embed(model: DemoTransformer, tokens: Tensor, cache: KVCache | None) -> Tensor:
    """Return the residual stream [batch pos d_model] before the first block.

    Without a cache, the positions of `tokens` start at 0. With a cache, they follow the cached
    positions.
    """
    positions = None if cache is None else cache.positions(tokens)
    return model.embed(tokens) + model.pos_embed(tokens, positions)


def block(module: nn.Module, residual: Tensor, cache: KVCache | None) -> Tensor:
    """Run the block `module` on the residual stream [batch pos d_model], and return its output.

    `cache` has one layer, in which the block stores its keys and values.
    """
    if cache is None:
        return module(residual)
    if isinstance(cache, StaticKVCache) and cache.slot is None:
        # Allocate the memory of the cache here, because a compiled block cannot do it.
        cache.slots(0, residual.device)
        n_heads, _, d_head = module.get_parameter("attn.W_Q").shape
        nothing = residual.new_zeros(len(residual), 0, n_heads, d_head)
        cache.layers[0].append(nothing, nothing)
    return module(residual, kv_cache=cache.layers[0])


class ExactParts:
    """Builds single parts of the model, such as a block, in float64 on the CPU.

    To save memory, each method converts only the weights that it needs from the state dict `state`.
    The weights are first rounded to `dtype`, the dtype of the model on the device, and then
    converted to float64. So they are equal to the device's weights.
    """

    def __init__(self, cfg: Config, state: State, dtype: torch.dtype):
        self.cfg, self.state, self.dtype = cfg, state, dtype

    def weight(self, name: str, index: Any = slice(None)) -> Tensor:
        """Return `state[name][index]`, rounded to `dtype` and converted to float64."""
        return self.state[name][index].to(self.dtype).double()

    def embeddings(self, tokens: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """Return the token embeddings and the position embeddings, both [batch pos d_model].

        Without a cache, the positions of `tokens` start at 0. With a cache, they follow the cached
        positions.
        """
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        if cache is not None:
            positions = cache.positions(tokens)
        return self.weight("embed.W_E", tokens), self.weight("pos_embed.W_pos", positions)

    def block(self, layer: int) -> Part:
        """Return a function that runs the block with the index `layer`."""
        return partial(block, self.module(f"blocks.{layer}"))

    def module(self, path: str) -> HookedModule:
        """Return the module at `path`: "ln_final", or a block, such as "blocks.0"."""
        is_norm = path == "ln_final"
        with torch.device("meta"):
            kind = NORMALIZATIONS[self.cfg.normalization_type] if is_norm else TransformerBlock
            module = kind(self.cfg)
        names = [name for name in self.state if name.startswith(f"{path}.")]
        weights = {name.removeprefix(f"{path}."): self.weight(name) for name in names}
        module.load_state_dict(weights, assign=True)
        return module

    @property
    def is_tied(self) -> bool:
        """Whether W_U is the transpose of W_E, so that `state` has no "unembed.W_U"."""
        return "unembed.W_U" not in self.state

    def unembedding(self, tokens: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return W_U [d_model token] and b_U [token] for the given token ids, by default all."""
        b_U = self.weight("unembed.b_U", tokens)
        if self.is_tied:
            return self.weight("embed.W_E", tokens).T, b_U
        return self.weight("unembed.W_U", (slice(None), tokens)), b_U

    def vocabulary(self) -> Iterator[slice]:
        """Split the vocabulary into slices of at most COLUMNS token ids."""
        for start in range(0, self.cfg.d_vocab, COLUMNS):
            yield slice(start, start + COLUMNS)

    def logits(self, x: Tensor) -> Tensor:
        """Return x W_U + b_U [... d_vocab] for x [... d_model]."""
        pairs = map(self.unembedding, self.vocabulary())
        return torch.cat([x @ W_U + b_U for W_U, b_U in pairs], dim=-1)
