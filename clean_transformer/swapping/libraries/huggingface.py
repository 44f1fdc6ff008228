"""Hugging Face's GPT-2: one KV cache for all layers, and a mask that includes causality."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.kv_cache import LayerCache, padding_mask
from clean_transformer.modules.contract import accepts, kind
from clean_transformer.swapping.libraries.base import Adapter, Library, Place, Residual, place_at
from clean_transformer.weights.formats.huggingface import config_from_json


class LayerOfTheirs:
    """Their cache and mask as our `kv_cache` of one layer."""

    def __init__(self, cache: Any, mask: Tensor | None, layer: int):
        self.cache, self.layer = cache, layer
        self.given = mask if mask is None or mask.dtype == torch.bool else mask >= 0
        self.length = 0 if cache is None else cache.get_seq_length(layer)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `LayerCache.append`."""
        if self.cache is None:
            return k, v
        k, v = self.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer)
        return k.transpose(1, 2), v.transpose(1, 2)

    def mask(self, n_queries: int) -> Bool[Tensor, "batch 1 query key"] | None:
        """As `LayerCache.mask`."""
        if self.given is None:
            return None
        return self.given | ~self.given.any(dim=-1, keepdim=True)


class AsBlock(Adapter):
    """Our block, called as their `GPT2Block`."""

    def __init__(self, module: nn.Module, layer: int):
        super().__init__(module)
        self.layer = layer

    def forward(
        self,
        hidden_states: Residual,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        *_: Any,
        past_key_values: Any = None,
        **unused: Any,
    ) -> Residual:
        """`attention_mask` [batch 1 query key] is True, or at least 0, where a query sees a key.

        `past_key_values` is the name of `cache` before transformers 5.24.
        """
        cache = past_key_values if cache is None else cache
        plain = cache is None and attention_mask is None
        layer = None if plain else LayerOfTheirs(cache, attention_mask, self.layer)
        return self.module(hidden_states, kv_cache=layer)


class AsAttention(AsBlock):
    """Our attention, called as their `GPT2Attention`."""

    def forward(  # type: ignore[override]
        self, *inputs: Any, **arguments: Any
    ) -> tuple[Residual, None]:
        """The output, and None for the attention pattern, which our hook points show."""
        return super().forward(*inputs, **arguments), None


class AsPositions(Adapter):
    """Our position embedding, called as their `wpe`."""

    def forward(self, position_ids: Int[Tensor, "batch pos"]) -> Residual:
        """The embeddings of the positions."""
        # The first argument, the tokens, only gives the shape.
        return self.module(position_ids, positions=position_ids)


class AsTheirCache:
    """Our cache of one layer, with the method that their attention calls on theirs."""

    def __init__(self, layer: LayerCache):
        self.layer = layer

    def update(self, k: Tensor, v: Tensor, *_: Any, **unused: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [batch head pos d_head], and return those of all positions so far."""
        k, v = self.layer.append(k.transpose(1, 2), v.transpose(1, 2))
        return k.transpose(1, 2), v.transpose(1, 2)


class FromBlock(Adapter):
    """Their `GPT2Block` or `GPT2Attention`, called as ours."""

    def forward(self, residual: Residual, kv_cache: LayerCache | None = None) -> Residual:
        """The output alone: theirs may come in a tuple, with the attention pattern."""
        n_queries, length = residual.shape[1], 0 if kv_cache is None else kv_cache.length
        seen = None if kv_cache is None else kv_cache.mask(n_queries)
        if seen is None:
            everything = residual.new_ones(1, length + n_queries, dtype=torch.bool)
            seen = padding_mask(everything, n_queries)
        hidden = residual.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(residual.dtype).min)
        cache = None if kv_cache is None else AsTheirCache(kv_cache)
        output = self.module(residual, attention_mask=hidden, **{self.cache_name(): cache})
        return output[0] if isinstance(output, tuple) else output

    def cache_name(self) -> str:
        """What their module calls its cache, which transformers 5.24 renamed."""
        return "cache" if accepts(self.module, "cache") else "past_key_values"


class FromPositions(Adapter):
    """Their `wpe`, an `nn.Embedding`, called as ours."""

    def forward(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"] | None = None
    ) -> Residual:
        """The embeddings of the positions, from 0 on unless given."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        return self.module(positions)


class HuggingFace(Library):
    """`GPT2LMHeadModel` of transformers, which has no hook points."""

    MODELS = ("transformers.GPT2LMHeadModel",)
    AS_OURS: Mapping[tuple[str, str], type[Adapter]] = {
        ("attn", "transformers.GPT2Attention"): FromBlock,
        ("block", "transformers.GPT2Block"): FromBlock,
        ("pos_embed", "torch.Embedding"): FromPositions,
    }
    NAMES: Mapping[str, str] = {
        "embed": "transformer.wte",
        "pos_embed": "transformer.wpe",
        "blocks": "transformer.h",
        "ln1": "ln_1",
        "ln2": "ln_2",
        "ln_final": "transformer.ln_f",
        "unembed": "lm_head",
    }

    def config(self, model: Any) -> Config:
        """The architecture of a model."""
        return config_from_json(model.config.to_dict())

    def find(self, model: Any, path: str) -> nn.Module | None:
        """The part at a path, or None if the model has none there."""
        return super().find(model, self.name(path))

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        """The part's own place."""
        return [place_at(model, self.name(path), self.as_theirs(path, module))]

    def lost(self, model: Any, path: str, places: list[Place]) -> list[str]:
        """None: there are no hook points to lose."""
        return []

    def name(self, path: str) -> str:
        """Their path of a part."""
        return ".".join(self.NAMES.get(word, word) for word in path.split("."))

    def as_theirs(self, path: str, module: nn.Module) -> nn.Module:
        """The module with their calling convention."""
        match kind(path):
            case "pos_embed":
                return AsPositions(module)
            case "attn":
                return AsAttention(module, layer_of(path))
            case "block":
                return AsBlock(module, layer_of(path))
        return module


def layer_of(path: str) -> int:
    """The number in "blocks.3" or "blocks.3.attn"."""
    return int(path.split(".")[1])
