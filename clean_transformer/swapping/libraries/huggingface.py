"""TODO swapping/libraries/huggingface."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.kv_cache import LayerCache, padding_mask
from clean_transformer.modules.contract import call_with_cache, embed_positions, kind
from clean_transformer.swapping.libraries.base import Adapter, Ours, Place, Residual, _layer, _place
from clean_transformer.weights.formats.huggingface import config_from_json

# Hugging Face: a cache for all layers, and a mask that already knows what is causal.


class _HuggingFaceLayer:
    """Hugging Face's cache and mask, as the `kv_cache` of one layer."""

    def __init__(self, cache: Any, mask: Tensor | None, layer: int):
        self.cache, self.layer = cache, layer
        self.given = mask if mask is None or mask.dtype == torch.bool else mask >= 0
        self.length = 0 if cache is None else cache.get_seq_length(layer)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.cache is None:
            return k, v
        k, v = self.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer)
        return k.transpose(1, 2), v.transpose(1, 2)

    def mask(self, n_queries: int) -> Bool[Tensor, "batch 1 query key"] | None:
        if self.given is None:
            return None
        return self.given | ~self.given.any(dim=-1, keepdim=True)


class HuggingFaceBlock(Adapter):
    """Ours, called as `GPT2Block`."""

    def __init__(self, module: nn.Module, layer: int):
        super().__init__(module)
        self.layer = layer

    def forward(
        self,
        hidden_states: Residual,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        *_: Any,
        **unused: Any,
    ) -> Residual:
        """`attention_mask` [batch 1 query key] is True, or not negative, where a query sees."""
        plain = past_key_values is None and attention_mask is None
        layer = _HuggingFaceLayer(past_key_values, attention_mask, self.layer)
        return call_with_cache(self.module, (hidden_states,), None if plain else layer)


class HuggingFaceAttention(HuggingFaceBlock):
    """Ours, called as `GPT2Attention`."""

    def forward(  # type: ignore[override]
        self, *inputs: Any, **arguments: Any
    ) -> tuple[Residual, None]:
        """The output, and none of the pattern: that is for the hook points to show."""
        return super().forward(*inputs, **arguments), None


class HuggingFacePositions(Adapter):
    """Ours, called as the `wpe` of `GPT2Model`."""

    def forward(self, position_ids: Int[Tensor, "batch pos"]) -> Residual:
        """The embeddings of the positions."""
        return embed_positions(self.module, position_ids, position_ids)


class _AsHuggingFaceCache:
    """Our cache of one layer, as Hugging Face's attention updates its own."""

    def __init__(self, layer: LayerCache):
        self.layer = layer

    def update(self, k: Tensor, v: Tensor, *_: Any, **unused: Any) -> tuple[Tensor, Tensor]:
        k, v = self.layer.append(k.transpose(1, 2), v.transpose(1, 2))
        return k.transpose(1, 2), v.transpose(1, 2)


class FromHuggingFaceBlock(Adapter):
    """Their `GPT2Block` or `GPT2Attention`, called as ours."""

    def forward(self, residual: Residual, kv_cache: LayerCache | None = None) -> Residual:
        """The output without what comes beside it."""
        n_queries, length = residual.shape[1], 0 if kv_cache is None else kv_cache.length
        seen = None if kv_cache is None else kv_cache.mask(n_queries)
        if seen is None:
            everything = residual.new_ones(1, length + n_queries, dtype=torch.bool)
            seen = padding_mask(everything, n_queries)
        hidden = residual.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(residual.dtype).min)
        cache = None if kv_cache is None else _AsHuggingFaceCache(kv_cache)
        output = self.module(residual, past_key_values=cache, attention_mask=hidden)
        return output[0] if isinstance(output, tuple) else output


class FromPositions(Adapter):
    """Their `wpe`, called with the tokens and their positions."""

    def forward(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"] | None = None
    ) -> Residual:
        """The embeddings of the positions, from 0 on unless given."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        return self.module(positions)


class _HuggingFace(Ours):
    """`GPT2LMHeadModel` of transformers. It has no hook points."""

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
        return config_from_json(model.config.to_dict())

    def find(self, model: Any, path: str) -> nn.Module | None:
        return super().find(model, self.name(path))

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        return [_place(model, self.name(path), self.adapted(path, module))]

    def lost(self, model: Any, path: str, places: list[Place]) -> list[str]:
        return []

    def name(self, path: str) -> str:
        """Their name of our path."""
        return ".".join(self.NAMES.get(word, word) for word in path.split("."))

    def adapted(self, path: str, module: nn.Module) -> nn.Module:
        """The module, called as theirs of that path."""
        match kind(path):
            case "pos_embed":
                return HuggingFacePositions(module)
            case "attn":
                return HuggingFaceAttention(module, _layer(path))
            case "block":
                return HuggingFaceBlock(module, _layer(path))
        return module
