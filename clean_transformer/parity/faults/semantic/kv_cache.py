"""Faults in the KV cache and in left padding. They change only calls with a KV cache."""

from collections.abc import Callable
from typing import Any

import torch

from clean_transformer.kv_cache import KVCache, _Layer, _StaticLayer
from clean_transformer.parity.faults.semantic.edits import (
    Change,
    Changes,
    Edit,
    SemanticFault,
)
from clean_transformer.support.replaced import replaced

MASK, POSITIONS = "blocks.0.attn.hook_attn_scores", "hook_pos_embed"


def with_padding(owner: type, method: str, edit: Edit) -> Change:
    """Return a code change that edits the padding [batch] of a KV cache for calls of `method`.

    `owner` is the class of the method: `KVCache`, or the class of one layer of a cache.
    """

    def change(right: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(self: Any, *args: Any) -> Any:
            cache = getattr(self, "cache", self)
            if cache.padding is None:
                return right(self, *args)
            with replaced(cache, "padding", edit(cache.padding)):
                return right(self, *args)

        return faulty

    return (owner, method, change)


def masking(edit: Edit) -> Changes:
    """Return the code changes that edit the padding from which KV caches make their masks."""
    return tuple(with_padding(owner, "mask", edit) for owner in (_Layer, _StaticLayer))


def in_later_calls(right: Callable[..., Any]) -> Callable[..., Any]:
    """Return a faulty `KVCache.positions`, which adds 1 to the positions after the first call."""
    return lambda self, tokens: right(self, tokens) + int(self.length > 0)


def without_padding(right: Callable[..., Any]) -> Callable[..., Any]:
    """Return a faulty `KVCache.select`, which does not reorder the padding."""

    def faulty(self: KVCache, rows: torch.Tensor) -> None:
        padding = self.padding
        right(self, rows)
        self.padding = padding

    return faulty


CACHE_FAULTS = (
    SemanticFault(
        "padding-mask-late",
        "every token sees the last padding position too",
        MASK,
        masking(lambda padding: (padding - 1).clamp(min=0)),
    ),
    SemanticFault(
        "padding-mask-early",
        "no token sees the first token of a padded text",
        MASK,
        masking(lambda padding: torch.where(padding > 0, padding + 1, padding)),
    ),
    SemanticFault(
        "padding-mask-missing",
        "every token sees all of the padding",
        MASK,
        masking(torch.zeros_like),
    ),
    SemanticFault(
        "padding-mask-of-first-text",
        "all texts of a batch have the padding of the first text",
        MASK,
        masking(lambda padding: padding[:1].expand_as(padding)),
    ),
    SemanticFault(
        "positions-count-padding",
        "positions count from the start of the padding",
        POSITIONS,
        (with_padding(KVCache, "positions", torch.zeros_like),),
    ),
    SemanticFault(
        "positions-count-one-padding",
        "positions count from the last padding position",
        POSITIONS,
        (with_padding(KVCache, "positions", lambda padding: (padding - 1).clamp(min=0)),),
    ),
    SemanticFault(
        "cached-positions-late",
        "with a KV cache, positions after the first call are one too high",
        POSITIONS,
        ((KVCache, "positions", in_later_calls),),
    ),
    SemanticFault(
        "padding-not-reordered",
        "a reordered KV cache keeps the old order of its padding",
        MASK,
        ((KVCache, "select", without_padding),),
    ),
)
