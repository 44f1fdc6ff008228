"""Variants of `Attention`: other scores, a sliding window, or keys and values shared by heads."""

import math
from dataclasses import replace

import torch
from einops import reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.hooks import HookPoint
from clean_transformer.modules.attention import (
    Attention,
    Keys,
    Mask,
    Queries,
    causal_mask,
    input_weight,
)
from clean_transformer.support.numerics import float32_or_more

# Keys or values that several heads share.
SharedKeys = Float[Tensor, "batch key kv_head d_head"]


class AlibiAttention(Attention):
    """ALiBi: the score is q kᵀ / √d_head − m (i − j) for query position i and key position j.

    Source: Press et al. 2022, section 3. Head h, from 1 to n_heads, has the slope
    m = 2^(−8 h / n_heads), as in TransformerLens. The paper's code and BLOOM use other slopes if
    n_heads is not a power of 2. `hook_attn_scores` gets the scores including the term −m (i − j).
    Use this module together with `NoPositions`.
    """

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Return, for each query, the weighted average of the values. Distant keys weigh less."""
        n_heads, exact = q.shape[2], float32_or_more(q.dtype)
        head = torch.arange(1, n_heads + 1, dtype=exact, device=q.device)
        slope = 2 ** (-8 * head / n_heads)
        key = torch.arange(k.shape[1], device=q.device)
        distance = key[-q.shape[1] :, None] - key
        bias = -slope[:, None, None] * distance
        return super().mix(q, k, v, added_mask(q, k, mask) + bias.to(q.dtype))


class RotaryAttention(Attention):
    """Attention with rotary position embeddings (RoPE; Su et al. 2021, section 3.2).

    The coordinates i and i + d_head/2 of each query and key form a pair, as in GPT-NeoX and Llama.
    Each pair is rotated by the angle position · base^(−2i / d_head). Therefore a score depends only
    on the distance between the query's position and the key's position, not on the positions
    themselves. `hook_rot_q` and `hook_rot_k` get the rotated queries and keys [batch pos head
    d_head]. `hook_q`, `hook_k` and the KV cache get the queries and keys before the rotation. Use
    this module together with `NoPositions`. Raises `ValueError` for an odd d_head.
    """

    def __init__(self, cfg: Config, base: float = 10000.0):
        if cfg.d_head % 2:
            raise ValueError(
                f"RotaryAttention rotates pairs of coordinates: d_head={cfg.d_head} must be even"
            )
        super().__init__(cfg)
        self.base = base
        self.hook_rot_q = HookPoint()
        self.hook_rot_k = HookPoint()

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Return, for each query, the average of the values weighted by the attention pattern."""
        position = torch.arange(k.shape[1], device=k.device)
        rot_q = self.hook_rot_q(rotate(q, position[-q.shape[1] :], self.base))
        rot_k = self.hook_rot_k(rotate(k, position, self.base))
        return super().mix(rot_q, rot_k, v, mask)


def rotate(
    x: Float[Tensor, "batch pos head d_head"], position: Int[Tensor, "pos"], base: float
) -> Float[Tensor, "batch pos head d_head"]:
    """Rotate each pair of coordinates, i and i + d_head/2, by position · base^(−2i / d_head).

    This angle is in radians.
    """
    exact, d_head = float32_or_more(x.dtype), x.shape[-1]
    frequency = base ** (-torch.arange(0, d_head, 2, dtype=exact, device=x.device) / d_head)
    angle = position[:, None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class SlidingWindowAttention(Attention):
    """Attention in which each query sees only `window` keys.

    These are the key at the query's own position and the `window` − 1 keys before it.
    Sources: Beltagy et al. 2020, section 3.1; Jiang et al. 2023. Raises `ValueError` for a `window`
    below 1.
    """

    def __init__(self, cfg: Config, window: int = 256):
        if window < 1:
            raise ValueError(f"window={window} must be 1 or more, because a query sees its own key")
        super().__init__(cfg)
        self.window = window

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Return, for each query, the weighted sum of up to `window` values."""
        near = causal_mask(q, k).triu(k.shape[1] - q.shape[1] - self.window + 1)
        return super().mix(q, k, v, added_mask(q, k, mask).masked_fill(~near, -math.inf))


class GroupedQueryAttention(Attention):
    """Attention in which groups of heads share keys and values (Ainslie et al. 2023).

    `n_kv_heads` is the number of groups. The default is one group, which is multi-query attention
    (Shazeer 2019). W_K and W_V are [kv_head d_model d_head], and b_K and b_V are [kv_head d_head];
    the axis `kv_head` has one entry per group. The queries of head h use the keys and values of
    group h // (n_heads / n_kv_heads). `hook_k`, `hook_v` and the KV cache get tensors
    [batch pos kv_head d_head]. If the block gives each head a separate input, the keys and values
    of a group are computed from the mean of the inputs of the group's heads. Raises `ValueError` if
    `n_kv_heads` does not divide n_heads.
    """

    def __init__(self, cfg: Config, n_kv_heads: int = 1):
        if n_kv_heads < 1 or cfg.n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads={n_kv_heads} must divide n_heads={cfg.n_heads}")
        super().__init__(cfg)
        self.n_kv_heads = n_kv_heads
        self.W_K, self.W_V = (input_weight(replace(cfg, n_heads=n_kv_heads)) for _ in "KV")
        self.b_K = nn.Parameter(torch.zeros(n_kv_heads, cfg.d_head))
        self.b_V = nn.Parameter(torch.zeros(n_kv_heads, cfg.d_head))

    def mix(self, q: Queries, k: SharedKeys, v: SharedKeys, mask: Mask = None) -> Queries:
        """Return, for each query, the average of the values weighted by the attention pattern."""
        group = q.shape[2] // self.n_kv_heads
        per_head = "batch key kv_head d_head -> batch key (kv_head group) d_head"
        return super().mix(
            q, repeat(k, per_head, group=group), repeat(v, per_head, group=group), mask
        )

    @torch.no_grad()
    def load_from(self, old: Attention) -> None:
        """Copy the parameters of `old`.

        W_K, W_V, b_K and b_V of each group are the means of the old parameters over the heads of
        the group (Ainslie et al. 2023, section 2.1).
        """
        for name, parameter in self.named_parameters():
            groups = "(kept group) ... -> kept ..."
            parameter.copy_(reduce(old.get_parameter(name), groups, "mean", kept=len(parameter)))


def added_mask(q: Queries, k: Keys, mask: Mask) -> Float[Tensor, "... query key"]:
    """Return `mask` as a float tensor that can be added to the attention scores.

    A boolean mask becomes 0 where a query sees a key, and −∞ elsewhere. A float mask is returned
    unchanged. If `mask` is None, the result is the causal mask in this form.
    """
    mask = causal_mask(q, k) if mask is None else mask
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
