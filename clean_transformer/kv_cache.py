"""KV caches: they store keys and values, so that a forward pass computes only new positions."""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

New = Float[Tensor, "batch new head d_head"]
Heads = Float[Tensor, "batch pos head d_head"]


@runtime_checkable
class LayerCache(Protocol):
    """The stored keys and values of one layer: the argument `kv_cache` of an attention module."""

    @property
    def length(self) -> int:
        """The number of cached positions, without the new positions of this forward pass."""

    def append(self, k: New, v: New) -> tuple[Heads, Heads]:
        """Store `k` and `v` of the new positions. Return all stored keys and all stored values."""

    def mask(self, n_queries: int) -> Bool[Tensor, "batch 1 query key"] | None:
        """Return a mask that is True where a query sees a key.

        The queries belong to the `n_queries` new positions. The keys belong to the cached positions
        and the new positions. If the result is None, each query sees all keys up to its own
        position.
        """


class KVCache:
    """The stored keys and values of every layer, for the first `length` positions.

    A model's forward pass stores the keys and values of its tokens in the cache, and increases
    `length` by the number of new positions. In the first forward pass, each layer allocates memory
    for `n_ctx` positions, with the dtype and on the device of the keys.

    Inputs of unequal length must be left-padded. `attention_mask` [batch pos] is 1 for tokens and 0
    for padding, as in transformers. The mask must be on the device of the tokens. Positions after
    the last column of the mask count as tokens. Raises `ValueError` if the mask has padding that is
    not on the left.
    """

    def __init__(
        self, n_layers: int, n_ctx: int, attention_mask: Int[Tensor, "batch pos"] | None = None
    ):
        self.n_ctx = n_ctx
        self.length = 0
        self.padding = None if attention_mask is None else left_padding(attention_mask)
        # The mask of the last forward pass with padding, after what it was made from.
        self.masked: tuple[Tensor, list[int], Tensor] | None = None
        self.layers = [_Layer(self) for _ in range(n_layers)]

    def require_fit(self, tokens: Int[Tensor, "batch pos"], n_layers: int, n_ctx: int) -> None:
        """Raise `ValueError` if `tokens` cannot follow the tokens in the cache.

        This is the case if the cache is for another number of layers than `n_layers`, if it holds
        another number of inputs than `tokens`, or if it has no room for the new positions. `n_ctx`
        is the number of positions that the model has.
        """
        if len(self.layers) != n_layers:
            raise ValueError(
                f"the cache has {len(self.layers)} layers, and the model has {n_layers}; make a "
                "KVCache(model.cfg.n_layers, n_ctx) for this model"
            )
        batch, new = tokens.shape
        keys = next((layer.keys for layer in self.layers if layer.keys is not None), None)
        held = len(keys) if keys is not None else batch
        if self.padding is not None:
            held = len(self.padding)
        if held != batch:
            raise ValueError(
                f"the cache holds a batch of {held}, but the tokens are a batch of {batch}; give "
                "the tokens that continue the same inputs, or use a new KVCache"
            )
        if self.length + new > self.n_ctx:
            raise ValueError(
                f"{new} tokens after the {self.length} in the cache are more than its "
                f"n_ctx={self.n_ctx} positions"
            )
        # Padding needs no position of the model. `max` waits for an accelerator, so it comes last.
        if self.length + new > n_ctx and int(self.positions(tokens).max()) >= n_ctx:
            raise ValueError(
                f"{new} tokens after the {self.length} in the cache are more than the "
                f"n_ctx={n_ctx} positions that the model has; shorten the text"
            )

    def slots(self, new: int, device: torch.device) -> Int[Tensor, "new"]:
        """Return the cache indices for the keys and values of the next `new` positions."""
        return torch.arange(self.length, self.length + new, device=device)

    def positions(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        """Return the position of each token in `tokens`. These tokens follow the cached tokens.

        In each input, the first token after the padding has position 0. Padding also has position
        0.
        """
        slots = self.slots(tokens.shape[1], tokens.device).expand(tokens.shape)
        if self.padding is None:
            return slots
        return (slots - self.padding[:, None]).clamp(min=0)

    def advance(self, new: int) -> None:
        """Increase `length` by `new`."""
        self.length += new

    def select(self, rows: Int[Tensor, "new_batch"]) -> None:
        """Keep only the inputs whose batch indices are in `rows`, in the order of `rows`.

        `rows` can contain an index more than once. The cache then holds this input more than once.
        """
        if self.padding is not None:
            self.padding = self.padding[rows]
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class _Layer:
    """The `LayerCache` of one layer of a `KVCache`."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        return self.cache.length

    def append(self, k: New, v: New) -> tuple[Heads, Heads]:
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RuntimeError("a KVCache keeps no gradients; use it under torch.no_grad()")
        if self.keys is None or self.values is None:
            self.keys, self.values = (memory_by_head(x, self.cache.n_ctx) for x in (k, v))
        if (self.keys.shape[2:], self.keys.dtype) != (k.shape[2:], k.dtype):
            held, given = (f"{[*x.shape[2:]]} in {x.dtype}" for x in (self.keys, k))
            raise ValueError(
                f"the cache holds keys [head d_head] of {held}, not of {given}; another model "
                "filled it, so use a new KVCache"
            )
        # `length` increases only after the whole forward pass. If a pass is interrupted, the next
        # pass therefore overwrites the incomplete keys and values.
        start, end = self.length, self.length + k.shape[1]
        self.keys[:, start:end] = k
        self.values[:, start:end] = v
        return self.keys[:, :end], self.values[:, :end]

    def mask(self, n_queries: int) -> Bool[Tensor, "batch 1 query key"] | None:
        if self.cache.padding is None:
            return None
        # All layers of a forward pass share one mask.
        known, (padding, *sizes) = self.cache.masked, (self.cache.padding, self.length, n_queries)
        if known is None or known[0] is not padding or known[1] != sizes:
            slots = torch.arange(self.length + n_queries, device=padding.device)
            mask = padding_mask(slots >= padding[:, None], n_queries)
            self.cache.masked = known = (padding, sizes, mask)
        return known[2]


class LeftPadding(KVCache):
    """Hides the padding on the left of the inputs in one forward pass, and stores no keys.

    So it keeps gradients. `attention_mask` is as in `KVCache`.
    """

    def __init__(self, n_layers: int, attention_mask: Int[Tensor, "batch pos"]):
        super().__init__(n_layers, attention_mask.shape[1], attention_mask)
        self.layers = [_Unstored(self) for _ in range(n_layers)]


class _Unstored(_Layer):
    """The `LayerCache` of one layer of a `LeftPadding`."""

    def append(self, k: New, v: New) -> tuple[Heads, Heads]:
        return k, v


class StaticKVCache(KVCache):
    """A `KVCache` whose tensors keep their shape and memory address in every forward pass.

    Therefore `torch.compile` and CUDA graphs can capture the forward pass of one token, and replay
    it for every later token. The memory of each layer has `room` slots. A slot holds the keys and
    values of one position. The tensor `slot` has one element: the index of the next empty slot.
    Attention reads all slots, and a mask hides the empty slots. `room` is `n_ctx` rounded up to a
    multiple of 256, so that caches with slightly different `n_ctx` have the same shape, and can
    share one compiled graph.
    """

    slot: Int[Tensor, "1"] | None = None

    def __init__(
        self, n_layers: int, n_ctx: int, attention_mask: Int[Tensor, "batch pos"] | None = None
    ):
        super().__init__(n_layers, n_ctx, attention_mask)
        self.room = math.ceil(n_ctx / 256) * 256
        self.layers = [_StaticLayer(self) for _ in range(n_layers)]

    def slots(self, new: int, device: torch.device) -> Int[Tensor, "new"]:
        """Return the cache indices for the keys and values of the next `new` positions."""
        if self.slot is None:
            self.slot = torch.zeros(1, dtype=torch.int64, device=device)
            torch._dynamo.mark_static_address(self.slot)
        return self.slot + torch.arange(new, device=device)

    def advance(self, new: int) -> None:
        """Increase `length` by `new`."""
        super().advance(new)
        if self.slot is not None:
            self.slot += new


class _StaticLayer(_Layer):
    """The `LayerCache` of one layer of a `StaticKVCache`."""

    cache: StaticKVCache

    def append(self, k: New, v: New) -> tuple[Heads, Heads]:
        if self.keys is None or self.values is None:
            # Attention multiplies the values of empty slots by 0. Uninitialized memory can contain
            # NaN, and 0 × NaN is NaN. So the memory starts with zeros.
            self.keys, self.values = (memory_by_head(x, self.cache.room).zero_() for x in (k, v))
            for memory in (self.keys, self.values):
                torch._dynamo.mark_static_address(memory)
        slots = self.cache.slots(k.shape[1], k.device)
        self.keys.index_copy_(1, slots, k)
        self.values.index_copy_(1, slots, v)
        return self.keys, self.values

    def mask(self, n_queries: int) -> Bool[Tensor, "batch 1 query key"] | None:
        assert self.cache.slot is not None  # `positions` calls `slots`, which sets `slot`
        key = torch.arange(self.cache.room, device=self.cache.slot.device)
        seen = (key <= self.cache.slots(n_queries, key.device)[:, None])[None, None]
        if self.cache.padding is None:
            return seen
        return all_if_none(seen & (key >= self.cache.padding[:, None])[:, None, None])


def memory_by_head(x: New, room: int) -> Heads:
    """Return uninitialized memory [batch room head d_head] for keys or values such as `x`.

    Attention reads one head after another. So all positions of a head are next to each other in
    memory.
    """
    batch, _, *heads, d_head = x.shape
    return x.new_empty(batch, *heads, room, d_head).movedim(-2, 1)


def padding_mask(
    is_token: Bool[Tensor, "batch key"], n_queries: int
) -> Bool[Tensor, "batch 1 query key"]:
    """Return a mask that is True where a query sees a key.

    `is_token` is False for padding. The queries belong to the last `n_queries` positions of
    `is_token`. A query sees the tokens up to its own position, but no padding. A query that
    would see no key, because it is padding, sees all keys (see `all_if_none`).
    """
    n_keys = is_token.shape[1]
    key = torch.arange(n_keys, device=is_token.device)
    return all_if_none((key <= key[n_keys - n_queries :, None]) & is_token[:, None, None])


def all_if_none(seen: Bool[Tensor, "*batch query key"]) -> Bool[Tensor, "*batch query key"]:
    """Return the mask `seen`, in which each query that sees no key sees all keys instead.

    Such a query is padding. A softmax over no keys would be NaN. The outputs for the tokens do not
    change, because no token sees padding.
    """
    return seen | ~seen.any(dim=-1, keepdim=True)


def left_padding(attention_mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch"]:
    """Return the number of padding positions at the start of each input.

    Each row of the mask must be zero or more 0s, followed by one or more 1s. Raises `ValueError`
    for any other row.
    """
    padding = (attention_mask == 0).sum(dim=1)
    slots = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    wanted = slots >= padding[:, None]
    if not (torch.equal(attention_mask, wanted.to(attention_mask.dtype)) and wanted[:, -1:].all()):
        raise ValueError(
            "every row of attention_mask must be 0 for padding on the left, then 1 for one or more "
            f"tokens; given {attention_mask.tolist()}"
        )
    return padding
