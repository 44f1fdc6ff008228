"""How other libraries call the parts of GPT-2: adapters for ours in theirs and theirs in ours.

Embeddings, LayerNorms, MLPs and unembeddings are called alike everywhere, with one tensor. What
differs is how attention, whole blocks and positions are told of what was read before, and of
padding.
"""

from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clean_transformer.kv_cache import LayerCache, embed_positions, padding_mask, read_on, takes

Residual = Float[Tensor, "batch pos d_model"]


class Adapter(nn.Module):
    """A module that is called by another convention than its own.

    What it is asked for besides, such as weights, it asks of the module.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


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
        return read_on(self.module, (hidden_states,), None if plain else layer)


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
        return read_on(self.module, (resid_pre,), _lens_layer(past_kv_cache_entry, attention_mask))


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
        return read_on(self.module, inputs, _lens_layer(past_kv_cache_entry, attention_mask))


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


# TransformerLens from 4 on: Hugging Face's modules in shells that fire hook points.


class Bridged(Adapter):
    """A module between the hook points of the shell whose place it takes."""

    # `TransformerBridge` says here how many inputs a row of positions is for.
    _current_batch_size: int | None = None

    def __init__(self, module: nn.Module, before: list[nn.Module], after: list[nn.Module]):
        super().__init__(module)
        self.before, self.after = nn.ModuleList(before), nn.ModuleList(after)

    def forward(self, x: Tensor, *rest: Any, **arguments: Any) -> Any:
        """The module's output, or the first of its outputs, through the hook points."""
        for point in self.before:
            x = point(x)
        output = self.module(x, *rest, **arguments)
        first, others = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if self._current_batch_size is not None:
            first = first.expand(self._current_batch_size, -1, -1)
        for point in self.after:
            first = point(first)
        return first if others is None else (first, *others)


class MergedHeads(nn.Module):
    """A hook point of theirs that sees the heads side by side, where ours have an axis."""

    def __init__(self, point: nn.Module):
        super().__init__()
        self.point = point

    def forward(
        self, activation: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """What their point makes of it."""
        merged = self.point(
            rearrange(activation, "batch pos head d_head -> batch pos (head d_head)")
        )
        return rearrange(
            merged, "batch pos (head d_head) -> batch pos head d_head", head=activation.shape[2]
        )
