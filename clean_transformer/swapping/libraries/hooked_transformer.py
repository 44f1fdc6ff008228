"""Finds and replaces modules in a `HookedTransformer`, the model of TransformerLens before 4.

The blocks and the attentions of a `HookedTransformer` take a KV cache entry and a mask. The entry
holds the keys and values of one layer. The mask is 1 for tokens and 0 for padding.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Int
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.hooks import hook_points
from clean_transformer.kv_cache import LayerCache, padding_mask
from clean_transformer.modules.contract import accepts, kind
from clean_transformer.support.validation import require
from clean_transformer.swapping.libraries.base import (
    Adapter,
    Library,
    Place,
    Residual,
    place_at,
)

# The flags of a `HookedTransformerConfig` that change what a model computes, in addition to those
# that `Config.of` checks, with their values for GPT-2.
GPT2 = {
    "use_attn_scale": True,
    "scale_attn_by_inverse_layer_idx": False,
    "attention_dir": "causal",
    "use_local_attn": False,
    "parallel_attn_mlp": False,
    "gated_mlp": False,
    "attn_scores_soft_cap": -1.0,
    "output_logits_soft_cap": -1.0,
    "post_embedding_ln": False,
    "use_normalization_before_and_after": False,
    "use_qk_norm": False,
    "use_logn_attn": False,
    "clip_qkv": None,
    "num_experts": None,
}


class LayerOfTheirs:
    """A KV cache for one of our modules, which stores keys and values in TransformerLens's cache.

    `entry` is TransformerLens's cache of one layer, or None if there is no cache. `is_token`
    [batch key] is 1 for tokens and 0 for padding, or None if there is no padding.
    """

    def __init__(self, entry: Any, is_token: Tensor | None):
        self.entry = entry
        self.is_token = None if is_token is None or is_token.all() else is_token.bool()
        self.length = 0 if entry is None else entry.past_keys.shape[1]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k` and `v` [batch pos head d_head]. Return keys and values of all positions."""
        if self.entry is None:
            return k, v
        if k.shape[2:] == self.entry.past_keys.shape[2:]:
            return self.entry.append(k, v)
        # TransformerLens's entry takes only keys and values of one shape. Our module's keys and
        # values have another shape here, so we store them in an extra attribute of the entry. We
        # append zeros to the entry itself, so that it has the right number of positions.
        past_k, past_v = getattr(self.entry, "of_other_shape", (k[:, :0], v[:, :0]))
        so_far = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
        if not self.entry.frozen:
            self.entry.of_other_shape = so_far
        count = k.new_zeros(*k.shape[:2], *self.entry.past_keys.shape[2:])
        self.entry.append(count, count)
        return so_far

    def mask(self, n_queries: int) -> Bool[Tensor, "batch 1 query key"] | None:
        """Return a mask that is True where a query sees a key, or None if there is no padding."""
        return None if self.is_token is None else padding_mask(self.is_token, n_queries)


class AsBlock(Adapter):
    """Wraps our block, so that TransformerLens can call it like its own `TransformerBlock`."""

    def forward(
        self,
        resid_pre: Residual,
        shortformer_pos_embed: None = None,
        past_kv_cache_entry: Any = None,
        attention_mask: Int[Tensor, "batch key"] | None = None,
    ) -> Residual:
        """Return the output of our block.

        `attention_mask` is 1 for tokens and 0 for padding, at the cached and the new positions.
        """
        return self.module(resid_pre, kv_cache=as_layer(past_kv_cache_entry, attention_mask))


class AsAttention(Adapter):
    """Wraps our attention, so that TransformerLens can call it like its own `Attention`."""

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
        """Return the output of our attention.

        `attention_mask` is 1 for tokens and 0 for padding, at the cached and the new positions.
        """
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
    """Wraps our position embedding, so that TransformerLens can call it like its own `PosEmbed`."""

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        past_kv_pos_offset: int = 0,
        attention_mask: Int[Tensor, "batch key"] | None = None,
    ) -> Residual:
        """Return the position embeddings of `tokens`.

        In each input, the first token after the padding has position 0. Padding also has position
        0. `past_kv_pos_offset` is the number of cached positions.
        """
        end = past_kv_pos_offset + tokens.shape[1]
        if attention_mask is None:
            positions = torch.arange(past_kv_pos_offset, end, device=tokens.device)
            return self.module(tokens, positions=positions.expand(tokens.shape))
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        return self.module(tokens, positions=positions[:, past_kv_pos_offset:end])


def as_layer(entry: Any, is_token: Tensor | None) -> LayerOfTheirs | None:
    """Convert TransformerLens's cache entry and padding mask to a KV cache for one of our modules.

    Returns None if there is no entry and no padding.
    """
    layer = LayerOfTheirs(entry, is_token)
    return None if entry is None and layer.is_token is None else layer


class AsTheirEntry:
    """A cache entry for TransformerLens's modules, which stores keys and values in our KV cache."""

    def __init__(self, layer: LayerCache, like: Tensor):
        self.layer = layer
        # TransformerLens reads only the number of positions of `past_keys`.
        self.past_keys = like.new_empty(len(like), layer.length, 0)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store `k` and `v` [batch pos head d_head]. Return keys and values of all positions."""
        return self.layer.append(k, v)


class FromBlock(Adapter):
    """Wraps TransformerLens's `TransformerBlock`, so that our model can call it like our block."""

    def forward(self, *inputs: Tensor, kv_cache: LayerCache | None = None) -> Residual:
        """Return the output of TransformerLens's module, for the positions in `inputs`."""
        if kv_cache is None:
            return self.module(*inputs)
        seen = kv_cache.mask(inputs[0].shape[1])
        return self.module(
            *inputs,
            past_kv_cache_entry=AsTheirEntry(kv_cache, inputs[0]),
            attention_mask=None if seen is None else seen[:, 0, -1].int(),
        )


class FromAttention(FromBlock):
    """Wraps TransformerLens's `Attention`, so that our model can call it like our attention."""

    def forward(  # type: ignore[override]
        self,
        query_input: Tensor,
        key_input: Tensor | None = None,
        value_input: Tensor | None = None,
        kv_cache: LayerCache | None = None,
    ) -> Residual:
        """Return the output of TransformerLens's attention.

        If `key_input` or `value_input` is None, `query_input` takes its place.
        """
        inputs = [query_input if x is None else x for x in (query_input, key_input, value_input)]
        cfg: Any = self.module.cfg
        if query_input.ndim == 3 and (cfg.use_attn_in or cfg.use_split_qkv_input):
            each_head = "batch pos d_model -> batch pos head d_model"
            inputs = [repeat(x, each_head, head=cfg.n_heads) for x in inputs]
        return super().forward(*inputs, kv_cache=kv_cache)


class Lens(Library):
    """Finds and replaces modules in a `HookedTransformer`.

    When `transplant` replaces a module, the old module's hook points replace the hook points with
    the same names in the new module. Hook points that the model's configuration turns off, such as
    `hook_q_input`, stay out of the new module.
    """

    # The reason: `run_with_cache` puts hooks on all hook points of the model, and with a hook on
    # `hook_q_input`, our modules would compute one residual stream per head.

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
    # The keys are the hook points that run only if a flag in the model's configuration is True. The
    # values are the names of the flags.
    OPTIONAL: Mapping[str, str] = {
        "hook_attn_in": "use_attn_in",
        "hook_q_input": "use_split_qkv_input",
        "hook_k_input": "use_split_qkv_input",
        "hook_v_input": "use_split_qkv_input",
        "hook_result": "use_attn_result",
    }

    def config(self, model: Any) -> Config:
        """Return the architecture of `model`. Raises `ValueError` if it is not that of GPT-2."""
        for flag, value in GPT2.items():
            require(model.cfg, flag, getattr(model.cfg, flag, value) == value, repr(value))
        scale = math.sqrt(model.cfg.d_head)
        require(model.cfg, "attn_scale", math.isclose(model.cfg.attn_scale, scale), str(scale))
        return Config.of(model.cfg)

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        """Return the steps, one `Place` each, that put `module` at `path` in `model`.

        The first steps put the old module's hook points into `module`.
        """
        adapter = self.AS_THEIRS.get(kind(path))
        points = [place for place, _ in self.shared_points(model, path, module)]
        return [*points, place_at(model, path, adapter(module) if adapter else module)]

    def lost(self, model: Any, path: str, places: list[Place], idle: Collection[str]) -> list[str]:
        """Return the full names of the old hook points that do not run with the new module.

        `places` has the steps that put the new module at `path`. `idle` has the full names of hook
        points that the new module has, and does not run.
        """
        run = {id(part) for place in places for part in place.module.modules()}
        run |= {id(part) for place in places for part in place.owner.children()}
        return [
            name
            for name, point in self.points(model, path).items()
            if id(point) not in run or name in idle
        ]

    def points(self, model: Any, path: str) -> dict[str, nn.Module]:
        """Return the hook points of the module at `path`, by full name.

        Hook points that the model's configuration turns off are left out.
        """

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
        """Yield each hook point that the new `module` and the old module at `path` both have.

        A hook point is yielded as a pair: the `Place` that puts the old hook point into `module`,
        and the hook point's full name in `model`.
        """
        theirs = self.points(model, path)
        for below in hook_points(module):
            if f"{path}.{below}" in theirs:
                yield place_at(module, below, theirs[f"{path}.{below}"]), f"{path}.{below}"
