"""TODO swapping/libraries/hooked_transformer."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Int
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.kv_cache import LayerCache, padding_mask
from clean_transformer.modules.contract import call_with_cache, embed_positions, kind, takes
from clean_transformer.swapping.libraries.base import (
    Adapter,
    Ours,
    Place,
    Residual,
    _hook_points,
    _place,
)

# TransformerLens before 4: a cache entry per layer, and which positions hold tokens.


class _LensLayer:
    """`HookedTransformer`'s cache entry and padding, as the `kv_cache` of one layer."""

    def __init__(self, entry: Any, is_token: Tensor | None):
        self.entry = entry
        self.is_token = None if is_token is None or is_token.all() else is_token.bool()
        self.length = 0 if entry is None else entry.past_keys.shape[1]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.entry is None:
            return k, v
        if k.shape[2:] == self.entry.past_keys.shape[2:]:
            return self.entry.append(k, v)
        # It insists on its own shape of keys: ours go beside them, and zeros keep the count.
        past_k, past_v = getattr(self.entry, "of_other_shape", (k[:, :0], v[:, :0]))
        so_far = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
        if not self.entry.frozen:
            self.entry.of_other_shape = so_far
        count = k.new_zeros(*k.shape[:2], *self.entry.past_keys.shape[2:])
        self.entry.append(count, count)
        return so_far

    def mask(self, n_queries: int) -> Bool[Tensor, "batch 1 query key"] | None:
        return None if self.is_token is None else padding_mask(self.is_token, n_queries)


class LensBlock(Adapter):
    """Ours, called as `HookedTransformer`'s `TransformerBlock`."""

    def forward(
        self,
        resid_pre: Residual,
        shortformer_pos_embed: None = None,
        past_kv_cache_entry: Any = None,
        attention_mask: Int[Tensor, "batch key"] | None = None,
    ) -> Residual:
        """`attention_mask` is 1 for tokens and 0 for padding, of all positions so far."""
        return call_with_cache(
            self.module, (resid_pre,), _lens_layer(past_kv_cache_entry, attention_mask)
        )


class LensAttention(Adapter):
    """Ours, called as `HookedTransformer`'s `Attention`."""

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
        if not takes(type(self.module).forward, "key_input"):
            if query_input.ndim == 4:
                raise ValueError(
                    f"{type(self.module).__name__} takes one stream for all heads; leave "
                    "use_attn_in and use_split_qkv_input off"
                )
            inputs = inputs[:1]
        return call_with_cache(
            self.module, inputs, _lens_layer(past_kv_cache_entry, attention_mask)
        )


class LensPositions(Adapter):
    """Ours, called as `HookedTransformer`'s `PosEmbed`."""

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch key"] | None = None,
    ) -> Residual:
        """The embeddings of the positions, counted without padding; for padding, the first's."""
        end = past_kv_pos_offset + tokens.shape[1]
        if attention_mask is None:
            slots = torch.arange(past_kv_pos_offset, end, device=tokens.device)
            return embed_positions(self.module, tokens, slots.expand(tokens.shape))
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        return embed_positions(self.module, tokens, positions[:, past_kv_pos_offset:end])


def _lens_layer(entry: Any, is_token: Tensor | None) -> _LensLayer | None:
    """What they say of earlier positions and of padding; None if there are neither."""
    layer = _LensLayer(entry, is_token)
    return None if entry is None and layer.is_token is None else layer


class _AsLensEntry:
    """Our cache of one layer, as `HookedTransformer`'s attention appends to its own."""

    def __init__(self, layer: LayerCache, like: Tensor):
        self.layer = layer
        self.past_keys = like.new_empty(len(like), layer.length, 0)  # asked for its length only

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer.append(k, v)


class FromLensBlock(Adapter):
    """Their `TransformerBlock`, called as ours."""

    def forward(self, *inputs: Tensor, kv_cache: LayerCache | None = None) -> Residual:
        """The output; with `kv_cache`, of positions after those in it."""
        if kv_cache is None:
            return self.module(*inputs)
        seen = kv_cache.mask(inputs[0].shape[1])
        return self.module(
            *inputs,
            past_kv_cache_entry=_AsLensEntry(kv_cache, inputs[0]),
            attention_mask=None if seen is None else seen[:, 0, -1].int(),
        )


class FromLensAttention(FromLensBlock):
    """Their `Attention`, called as ours."""

    def forward(  # type: ignore[override]
        self,
        query_input: Tensor,
        key_input: Tensor | None = None,
        value_input: Tensor | None = None,
        kv_cache: LayerCache | None = None,
    ) -> Residual:
        """Keys and values are read from `query_input` too, unless given their own."""
        inputs = [query_input if x is None else x for x in (query_input, key_input, value_input)]
        cfg: Any = self.module.cfg
        if query_input.ndim == 3 and (cfg.use_attn_in or cfg.use_split_qkv_input):
            each_head = "batch pos d_model -> batch pos head d_model"
            inputs = [repeat(x, each_head, head=cfg.n_heads) for x in inputs]
        return super().forward(*inputs, kv_cache=kv_cache)


class FromLensPositions(Adapter):
    """Their `PosEmbed`, called with the tokens and their positions."""

    def forward(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"] | None = None
    ) -> Residual:
        """The embeddings of the positions, from 0 on unless given."""
        return embed_positions(self.module, tokens, positions)


class _Lens(Ours):
    """`HookedTransformer` of transformer_lens before 4. Its hook points take the place of ours.

    Except those that it fires only when it is configured to: it hooks them all for a cache, and
    ours would compute for each head what nobody asked for.
    """

    OPTIONAL: Mapping[str, str] = {
        "hook_attn_in": "use_attn_in",
        "hook_q_input": "use_split_qkv_input",
        "hook_k_input": "use_split_qkv_input",
        "hook_v_input": "use_split_qkv_input",
        "hook_result": "use_attn_result",
    }

    ADAPTERS: Mapping[str, Any] = {
        "attn": LensAttention,
        "block": LensBlock,
        "pos_embed": LensPositions,
    }

    def config(self, model: Any) -> Config:
        return Config(
            **{
                axis: getattr(model.cfg, axis) for axis in ("d_model", "d_head", "d_mlp", "d_vocab")
            },
            **{name: getattr(model.cfg, name) for name in ("n_layers", "n_heads", "n_ctx", "eps")},
            normalization_type=model.cfg.normalization_type,
            tied_unembed=False,
        )

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        adapter = self.ADAPTERS.get(kind(path))
        adapted = adapter(module) if adapter else module
        points = [Place(*point) for point, _ in self.shared_points(model, path, module)]
        return [*points, _place(model, path, adapted)]

    def lost(self, model: Any, path: str, places: list[Place]) -> list[str]:
        fired = {id(part) for place in places for part in place.module.modules()}
        fired |= {id(part) for place in places for part in place.owner.children()}
        return [name for name, point in self.points(model, path).items() if id(point) not in fired]

    def points(self, model: Any, path: str) -> dict[str, nn.Module]:
        """The hook points of a part that fire, by their full names."""

        def fires(name: str) -> bool:
            flag = self.OPTIONAL.get(name.split(".")[-1])
            return getattr(model.cfg, flag, False) if flag else ".qkv." not in name

        return {
            name: point
            for name, point in model.hook_dict.items()
            if name.startswith(f"{path}.") and fires(name)
        }

    def shared_points(
        self, model: Any, path: str, module: nn.Module
    ) -> Iterator[tuple[tuple[nn.Module, str, nn.Module], str]]:
        """Where the module has a point of the same name as theirs: its owner, its name there and
        theirs; and the full name."""
        theirs = self.points(model, path)
        for below, _ in _hook_points(module):
            full = f"{path}.{below}"
            if full in theirs:
                owner, _, name = below.rpartition(".")
                yield (module.get_submodule(owner), name, theirs[full]), full
