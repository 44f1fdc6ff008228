"""TransformerLens before version 4: one cache entry per layer, and a mask of tokens and padding."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Int
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.hooks import hook_points
from clean_transformer.kv_cache import LayerCache, padding_mask
from clean_transformer.modules.contract import accepts, kind
from clean_transformer.swapping.libraries.base import (
    Adapter,
    Library,
    Place,
    Residual,
    place_at,
)


class LayerOfTheirs:
    """Their cache entry and padding as our `kv_cache` of one layer."""

    def __init__(self, entry: Any, is_token: Tensor | None):
        self.entry = entry
        self.is_token = None if is_token is None or is_token.all() else is_token.bool()
        self.length = 0 if entry is None else entry.past_keys.shape[1]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `LayerCache.append`."""
        if self.entry is None:
            return k, v
        if k.shape[2:] == self.entry.past_keys.shape[2:]:
            return self.entry.append(k, v)
        # Their entry takes only keys of their shape. So it gets zeros, which keep its length right,
        # and ours are stored beside it.
        past_k, past_v = getattr(self.entry, "of_other_shape", (k[:, :0], v[:, :0]))
        so_far = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
        if not self.entry.frozen:
            self.entry.of_other_shape = so_far
        count = k.new_zeros(*k.shape[:2], *self.entry.past_keys.shape[2:])
        self.entry.append(count, count)
        return so_far

    def mask(self, n_queries: int) -> Bool[Tensor, "batch 1 query key"] | None:
        """As `LayerCache.mask`."""
        return None if self.is_token is None else padding_mask(self.is_token, n_queries)


class AsBlock(Adapter):
    """Our block, called as their `TransformerBlock`."""

    def forward(
        self,
        resid_pre: Residual,
        shortformer_pos_embed: None = None,
        past_kv_cache_entry: Any = None,
        attention_mask: Int[Tensor, "batch key"] | None = None,
    ) -> Residual:
        """`attention_mask` is 1 for tokens and 0 for padding, of all positions so far."""
        return self.module(resid_pre, kv_cache=as_layer(past_kv_cache_entry, attention_mask))


class AsAttention(Adapter):
    """Our attention, called as their `Attention`."""

    def forward(
        self,
        query_input: Tensor,
        key_input: Tensor,
        value_input: Tensor,
        past_kv_cache_entry: Any = None,
        additive_attention_mask: None = None,
        attention_mask: Int[Tensor, "batch key"] | None = None,
        position_bias: None = None,
    ) -> Residual:
        """`attention_mask` is 1 for tokens and 0 for padding, of all positions so far."""
        inputs: tuple[Tensor, ...] = (query_input, key_input, value_input)
        if not accepts(self.module, "key_input"):
            if query_input.ndim == 4:
                raise ValueError(
                    f"{type(self.module).__name__} takes one input for all heads; set "
                    "cfg.use_attn_in and cfg.use_split_qkv_input to False"
                )
            inputs = inputs[:1]
        return self.module(*inputs, kv_cache=as_layer(past_kv_cache_entry, attention_mask))


class AsPositions(Adapter):
    """Our position embedding, called as their `PosEmbed`."""

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch key"] | None = None,
    ) -> Residual:
        """The embeddings of the positions, which count from the first token after the padding.

        Padding gets position 0.
        """
        end = past_kv_pos_offset + tokens.shape[1]
        if attention_mask is None:
            positions = torch.arange(past_kv_pos_offset, end, device=tokens.device)
            return self.module(tokens, positions=positions.expand(tokens.shape))
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        return self.module(tokens, positions=positions[:, past_kv_pos_offset:end])


def as_layer(entry: Any, is_token: Tensor | None) -> LayerOfTheirs | None:
    """Their cache entry and padding as our `kv_cache`; None if there is neither."""
    layer = LayerOfTheirs(entry, is_token)
    return None if entry is None and layer.is_token is None else layer


class AsTheirEntry:
    """Our cache of one layer, with what their attention uses of a cache entry."""

    def __init__(self, layer: LayerCache, like: Tensor):
        self.layer = layer
        self.past_keys = like.new_empty(len(like), layer.length, 0)  # only its length is read

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [batch pos head d_head], and return those of all positions so far."""
        return self.layer.append(k, v)


class FromBlock(Adapter):
    """Their `TransformerBlock`, called as ours."""

    def forward(self, *inputs: Tensor, kv_cache: LayerCache | None = None) -> Residual:
        """The output; with `kv_cache`, of positions after those in it."""
        if kv_cache is None:
            return self.module(*inputs)
        seen = kv_cache.mask(inputs[0].shape[1])
        return self.module(
            *inputs,
            past_kv_cache_entry=AsTheirEntry(kv_cache, inputs[0]),
            attention_mask=None if seen is None else seen[:, 0, -1].int(),
        )


class FromAttention(FromBlock):
    """Their `Attention`, called as ours."""

    def forward(  # type: ignore[override]
        self,
        query_input: Tensor,
        key_input: Tensor | None = None,
        value_input: Tensor | None = None,
        kv_cache: LayerCache | None = None,
    ) -> Residual:
        """Keys and values are read from `query_input`, unless they have inputs of their own."""
        inputs = [query_input if x is None else x for x in (query_input, key_input, value_input)]
        cfg: Any = self.module.cfg
        if query_input.ndim == 3 and (cfg.use_attn_in or cfg.use_split_qkv_input):
            each_head = "batch pos d_model -> batch pos head d_model"
            inputs = [repeat(x, each_head, head=cfg.n_heads) for x in inputs]
        return super().forward(*inputs, kv_cache=kv_cache)


class Lens(Library):
    """`HookedTransformer`. Its own hook points take the place of ours in a transplanted module.

    Our hook points stay where theirs would not run, because the configuration turns them off. A
    TransformerLens cache hooks all of them, and ours would then compute one stream per head, which
    nobody asked for.
    """

    MODELS: tuple[str, ...] = ("transformer_lens.HookedTransformer",)
    AS_OURS: Mapping[tuple[str, str], type[Adapter]] = {
        ("attn", "transformer_lens.AbstractAttention"): FromAttention,
        ("block", "transformer_lens.TransformerBlock"): FromBlock,
        ("pos_embed", "transformer_lens.PosEmbed"): Adapter,
    }
    AS_THEIRS: Mapping[str, type[Adapter]] = {
        "attn": AsAttention,
        "block": AsBlock,
        "pos_embed": AsPositions,
    }
    # The hook points that run only if a flag of the configuration is set, and that flag.
    OPTIONAL: Mapping[str, str] = {
        "hook_attn_in": "use_attn_in",
        "hook_q_input": "use_split_qkv_input",
        "hook_k_input": "use_split_qkv_input",
        "hook_v_input": "use_split_qkv_input",
        "hook_result": "use_attn_result",
    }

    def config(self, model: Any) -> Config:
        """The architecture of a model."""
        same = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx", "eps")
        return Config(
            **{name: getattr(model.cfg, name) for name in same},
            normalization_type=model.cfg.normalization_type,
            tied_unembed=False,
        )

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        """Their hook points inside the module, and the module in the part's place."""
        adapter = self.AS_THEIRS.get(kind(path))
        points = [place for place, _ in self.shared_points(model, path, module)]
        return [*points, place_at(model, path, adapter(module) if adapter else module)]

    def lost(self, model: Any, path: str, places: list[Place]) -> list[str]:
        """Their hook points that are in none of the places."""
        run = {id(part) for place in places for part in place.module.modules()}
        run |= {id(part) for place in places for part in place.owner.children()}
        return [name for name, point in self.points(model, path).items() if id(point) not in run]

    def points(self, model: Any, path: str) -> dict[str, nn.Module]:
        """The hook points of a part that run, by their full names."""

        def runs(name: str) -> bool:
            flag = self.OPTIONAL.get(name.split(".")[-1])
            return getattr(model.cfg, flag, False) if flag else ".qkv." not in name

        return {
            name: point
            for name, point in model.hook_dict.items()
            if name.startswith(f"{path}.") and runs(name)
        }

    def shared_points(
        self, model: Any, path: str, module: nn.Module
    ) -> Iterator[tuple[Place, str]]:
        """The places of the module's hook points that theirs can take, with their full names."""
        theirs = self.points(model, path)
        for below in hook_points(module):
            if f"{path}.{below}" in theirs:
                yield place_at(module, below, theirs[f"{path}.{below}"]), f"{path}.{below}"
