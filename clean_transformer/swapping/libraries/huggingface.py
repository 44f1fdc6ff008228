"""Finds and replaces modules in `GPT2LMHeadModel`, the GPT-2 of Hugging Face's transformers.

The blocks and the attentions of `GPT2LMHeadModel` take one KV cache for all layers, and a mask that
hides later positions and padding.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.kv_cache import LayerCache, all_if_none, padding_mask
from clean_transformer.modules.contract import accepts, kind
from clean_transformer.swapping.libraries.base import (
    Adapter,
    Library,
    Place,
    Residual,
    place_at,
    read_part,
)
from clean_transformer.weights.formats.huggingface import HUGGINGFACE, config_from_json


class LayerOfTheirs:
    """A KV cache for one of our modules, which stores keys and values in Hugging Face's cache.

    `cache` holds the keys and values of all layers, or is None if there is no cache. `layer` is the
    index of our module's layer. `mask` [batch 1 query key] is boolean (True where a query sees a
    key), float (0 or larger where a query sees a key), or None.
    """

    def __init__(self, cache: Any, mask: Tensor | None, layer: int):
        self.cache, self.layer = cache, layer
        self.given = mask if mask is None or mask.dtype == torch.bool else mask >= 0
        self.length = 0 if cache is None else cache.get_seq_length(layer)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k` and `v` [batch pos head d_head]. Return keys and values of all positions."""
        if self.cache is None:
            return k, v
        k, v = self.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer)
        return k.transpose(1, 2), v.transpose(1, 2)

    def mask(self, n_queries: int) -> Bool[Tensor, "batch 1 query key"] | None:
        """Return a mask that is True where a query sees a key, or None if there is no mask.

        A query that would see no key sees all keys (see `all_if_none`).
        """
        return None if self.given is None else all_if_none(self.given)


class AsBlock(Adapter):
    """Wraps our block, so that Hugging Face's model can call it like its own `GPT2Block`."""

    def __init__(self, module: nn.Module, layer: int):
        super().__init__(module)
        self.layer = layer

    def forward(
        self,
        hidden_states: Residual,
        cache: Any = None,
        *others: Any,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> Residual:
        """Return the output of our block.

        `attention_mask` [batch 1 query key] is boolean or float. A query sees a key where a boolean
        mask is True, or where a float mask is 0 or larger. Before transformers 5.24, the argument
        `cache` was called `past_key_values`.
        """
        cache = past_key_values if cache is None else cache
        # The mask is the only argument with 4 axes. In transformers 5.3, it follows the positions.
        masks = [each for each in others if isinstance(each, Tensor) and each.ndim == 4]
        attention_mask = masks[0] if masks else attention_mask
        plain = cache is None and attention_mask is None
        layer = None if plain else LayerOfTheirs(cache, attention_mask, self.layer)
        return self.module(hidden_states, kv_cache=layer)


class AsAttention(AsBlock):
    """Wraps our attention, so that Hugging Face's model can call it like its `GPT2Attention`."""

    def forward(  # type: ignore[override]
        self, *inputs: Any, **arguments: Any
    ) -> tuple[Residual, None]:
        """Return a pair: the output of our attention, and None instead of the attention pattern."""
        return super().forward(*inputs, **arguments), None


class AsPositions(Adapter):
    """Wraps our position embedding, so that Hugging Face's model can call it like its own."""

    def forward(self, position_ids: Int[Tensor, "batch pos"]) -> Residual:
        """Return the embeddings of the positions `position_ids`."""
        # The first argument of our module is `tokens`. A position embedding needs only the shape of
        # the tokens, and `position_ids` has this shape.
        return self.module(position_ids, positions=position_ids)


class AsTheirCache:
    """A cache for Hugging Face's modules, which stores keys and values in our KV cache."""

    def __init__(self, layer: LayerCache):
        self.layer = layer

    def update(self, k: Tensor, v: Tensor, *_: Any, **unused: Any) -> tuple[Tensor, Tensor]:
        """Store `k` and `v` [batch head pos d_head]. Return keys and values of all positions."""
        k, v = self.layer.append(k.transpose(1, 2), v.transpose(1, 2))
        return k.transpose(1, 2), v.transpose(1, 2)


class FromBlock(Adapter):
    """Wraps a `GPT2Block` or `GPT2Attention`, so that our model can call it like our own module."""

    def forward(self, residual: Residual, kv_cache: LayerCache | None = None) -> Residual:
        """Return the output of Hugging Face's module; from a tuple, return only the first item."""
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
        """Return the name of the module's cache argument in this version of transformers."""
        return "cache" if accepts(self.module, "cache") else "past_key_values"


class FromPositions(Adapter):
    """Wraps Hugging Face's position embedding, so that our model can call it like our own."""

    def forward(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"] | None = None
    ) -> Residual:
        """Return the embeddings of `positions`. The default is 0, 1, 2, … for every input."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        return self.module(positions)


class HuggingFace(Library):
    """Finds and replaces modules in a `GPT2LMHeadModel`, which has no hook points."""

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
        """Return the architecture of `model`."""
        return config_from_json(model.config.to_dict())

    def find(self, model: Any, path: str) -> nn.Module | None:
        """Return the module at `path`, or None if `model` has no such module."""
        return super().find(model, self.name(path))

    def weights(self, model: Any, path: str) -> dict[str, Tensor]:
        """Return the weights of the module at `path`, by this package's names, such as "W_Q"."""
        return read_part(HUGGINGFACE, self.config(model), model.state_dict(), path)

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        """Return a list with one step, which puts `module` at `path` in `model`."""
        return [place_at(model, self.name(path), self.as_theirs(path, module))]

    def lost(self, model: Any, path: str, places: list[Place], idle: Collection[str]) -> list[str]:
        """Return the names of the hook points that a swap loses: none, as the model has none."""
        return []

    def name(self, path: str) -> str:
        """Return the path in Hugging Face's model for `path`, a path in this package's models."""
        return ".".join(self.NAMES.get(word, word) for word in path.split("."))

    def as_theirs(self, path: str, module: nn.Module) -> nn.Module:
        """Return our `module`, wrapped so that Hugging Face's model can call it.

        `path` is the path of `module` in our models.
        """
        match kind(path):
            case "pos_embed":
                return AsPositions(module)
            case "attn":
                return AsAttention(module, layer_of(path))
            case "block":
                return AsBlock(module, layer_of(path))
        return module


def layer_of(path: str) -> int:
    """Return the layer of a path: 3 for "blocks.3" and for "blocks.3.attn"."""
    return int(path.split(".")[1])
