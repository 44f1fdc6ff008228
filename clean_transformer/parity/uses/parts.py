"""The parts of a model: the embeddings, each block, the last LayerNorm and the unembedding.

`uses/judge.py` runs each use (see `Use`) part by part, on the device and in float64 on the CPU.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.hooks import HookedModule
from clean_transformer.kv_cache import KVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.modules.layer_norm import NORMALIZATIONS
from clean_transformer.parity.uses.table import Use
from clean_transformer.weights.table import State

# A part of the model as a function of its input and of a KV cache with one layer. The cache is None
# in a use without a cache. The function returns the part's output.
Part = Callable[[Tensor, KVCache | None], Tensor]
# The unembedding is the largest weight. In float64, only this many of its columns are in memory.
COLUMNS = 8192


def run(
    use: Use, part: Part, inputs: Sequence[Tensor], cache_class: type[KVCache] = KVCache
) -> list[Tensor]:
    """Run one part of the model on the input of each call of a use, and return each call's output.

    If the use has a KV cache, all calls share one cache, on the device of the inputs. After a call
    in `use.selects`, the cache keeps only the selected rows of the batch.
    """
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
    """Move the padding counts of an empty cache to `device`, and return the cache.

    If `cache` is None, return None.
    """
    if cache is not None and cache.padding is not None:
        cache.padding = cache.padding.to(device)
    return cache


def embed(model: DemoTransformer, tokens: Tensor, cache: KVCache | None) -> Tensor:
    """Return the residual stream [batch pos d_model] before the first block.

    Positions continue after those that `cache` holds; without a cache, they start at 0.
    """
    positions = None if cache is None else cache.positions(tokens)
    return model.embed(tokens) + model.pos_embed(tokens, positions)


def block(module: nn.Module, residual: Tensor, cache: KVCache | None) -> Tensor:
    """Run one block on the residual stream [batch pos d_model], and return the result.

    `cache` has one layer, which stores the keys and values of this block.
    """
    if cache is None:
        return module(residual)
    # A static cache creates its tensor `slot` here; its layers need `slot`.
    cache.slots(residual.shape[1], residual.device)
    return module(residual, kv_cache=cache.layers[0])


class ExactParts:
    """The parts of the model in float64 on the CPU.

    Each method builds a part anew, so only one part at a time must be in memory. The weights come
    from `state`. They are rounded to `dtype` and then converted to float64, because the model on
    the device has weights in `dtype`.
    """

    def __init__(self, cfg: Config, state: State, dtype: torch.dtype):
        self.cfg, self.state, self.dtype = cfg, state, dtype

    def weight(self, name: str, index: Any = slice(None)) -> Tensor:
        """Return the parameter `name` of `state`, or only its part at `index`, in float64."""
        return self.state[name][index].to(self.dtype).double()

    def embeddings(self, tokens: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """Return the token embeddings and the position embeddings, both [batch pos d_model].

        Positions continue after those that `cache` holds; without a cache, they start at 0.
        """
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        if cache is not None:
            positions = cache.positions(tokens)
        return self.weight("embed.W_E", tokens), self.weight("pos_embed.W_pos", positions)

    def block(self, layer: int) -> Part:
        """Return the block with the index `layer`."""
        return partial(block, self.module(f"blocks.{layer}"))

    def module(self, path: str) -> HookedModule:
        """Return the block or the last LayerNorm ("ln_final") with this path in the model."""
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
        """Whether the unembedding has no weights of its own, and uses the token embeddings."""
        return "unembed.W_U" not in self.state

    def unembedding(self, tokens: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return W_U [d_model d_vocab] and b_U [d_vocab], or only their columns `tokens`."""
        b_U = self.weight("unembed.b_U", tokens)
        if self.is_tied:
            return self.weight("embed.W_E", tokens).T, b_U
        return self.weight("unembed.W_U", (slice(None), tokens)), b_U

    def vocabulary(self) -> Iterator[slice]:
        """Yield slices of at most COLUMNS token ids each. Together they are the vocabulary."""
        for start in range(0, self.cfg.d_vocab, COLUMNS):
            yield slice(start, start + COLUMNS)

    def logits(self, x: Tensor) -> Tensor:
        """Return x W_U + b_U [... d_vocab] for x [... d_model]."""
        pairs = map(self.unembedding, self.vocabulary())
        return torch.cat([x @ W_U + b_U for W_U, b_U in pairs], dim=-1)
