"""Ready variants: each takes the place of a module of ours, and is the start of an experiment.

They are made from a `Config`, as ours are, and keep our names where they mean the same; `load_from`
is for those that do not simply start from the weights of the same names. Every attention reads on
from a KV cache, and past padding on the left.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.hooks import HookPoint, observed
from clean_transformer.modules.attention import (
    Attention,
    Mask,
    causal_mask,
    input_weight,
    mix_fused,
)

try:
    from torch.nn.attention import flex_attention as flex
except ImportError:  # before PyTorch 2.5
    flex = None  # type: ignore[assignment, unused-ignore]


Tokens = Int[Tensor, "batch pos"]


Stream = Float[Tensor, "batch pos d_model"]


Rows = Float[Tensor, "*batch d_model"]


Queries = Float[Tensor, "batch query head d_head"]


Keys = Float[Tensor, "batch key head d_head"]


# Several queries' heads may share a key.
SharedKeys = Float[Tensor, "batch key kv_head d_head"]


class AlibiAttention(Attention):
    """q kᵀ / √d_head − m (i − j) for the scores of query i and key j, with a slope m for each head:
    2^(−8 h / n_heads), h from 1 to n_heads (Press et al. 2022, section 3).

    So in TransformerLens; the paper's code and BLOOM have other slopes unless n_heads is a power
    of 2. `hook_attn_scores` sees the sum. To be used with `NoPositions`.
    """

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Each query's average of the values, of near ones more than of far ones."""
        n_heads, exact = q.shape[2], torch.promote_types(q.dtype, torch.float32)
        head = torch.arange(1, n_heads + 1, dtype=exact, device=q.device)
        slope = 2 ** (-8 * head / n_heads)
        key = torch.arange(k.shape[1], device=q.device)
        distance = key[-q.shape[1] :, None] - key
        bias = -slope[:, None, None] * distance
        return super().mix(q, k, v, added_mask(q, k, mask) + bias.to(q.dtype))


class RotaryAttention(Attention):
    """Attention between queries and keys that are turned by an angle in proportion to their
    position, so that their product depends on how far apart they are (Su et al. 2021, section 3.2).

    Coordinates i and i + d_head/2 (a pair in GPT-NeoX and Llama) turn by position · base^(−2i /
    d_head). `hook_rot_q`, `hook_rot_k` [batch pos head d_head] see them turned, `hook_q`, `hook_k`
    and a cache unturned. To be used with `NoPositions`. Raises `ValueError` for an odd d_head.
    """

    def __init__(self, cfg: Config, base: float = 10000.0):
        if cfg.d_head % 2:
            raise ValueError(f"RotaryAttention turns pairs: d_head={cfg.d_head} must be even")
        super().__init__(cfg)
        self.base = base
        self.hook_rot_q = HookPoint()
        self.hook_rot_k = HookPoint()

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Each query's average of the values."""
        position = torch.arange(k.shape[1], device=k.device)
        rot_q = self.hook_rot_q(turn(q, position[-q.shape[1] :], self.base))
        rot_k = self.hook_rot_k(turn(k, position, self.base))
        return super().mix(rot_q, rot_k, v, mask)


def turn(
    x: Float[Tensor, "batch pos head d_head"], position: Int[Tensor, "pos"], base: float
) -> Float[Tensor, "batch pos head d_head"]:
    """Each pair of coordinates, turned by its angle."""
    exact, d_head = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
    frequency = base ** (-torch.arange(0, d_head, 2, dtype=exact, device=x.device) / d_head)
    angle = position[:, None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class SlidingWindowAttention(Attention):
    """Each query sees the last `window` keys, its own among them (Beltagy et al. 2020, section 3.1;
    Jiang et al. 2023). Raises `ValueError` for a window of less than 1.
    """

    def __init__(self, cfg: Config, window: int = 256):
        if window < 1:
            raise ValueError(f"window={window} must be 1 or more, for a query sees its own key")
        super().__init__(cfg)
        self.window = window

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Each query's average of the latest values."""
        near = causal_mask(q, k).triu(k.shape[1] - q.shape[1] - self.window + 1)
        return super().mix(q, k, v, added_mask(q, k, mask).masked_fill(~near, -math.inf))


class LinearAttention(Attention):
    """Σⱼ φ(q)·φ(kⱼ) vⱼ / Σⱼ φ(q)·φ(kⱼ) over the past, with φ(x) = elu(x) + 1 (Katharopoulos et al.
    2020, equations 7 and 9): in time linear in length, as φ(k) vᵀ is summed before q is known.

    The sums [batch pos head d_head d_head+1] are held for every new position. Where scores or
    pattern are observed, or a mask given, as with padding, it takes its quadratic form:
    `hook_attn_scores` sees φ(q)·φ(k), 0 for what a query does not see, and `hook_pattern` their
    shares.
    """

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Each query's average of the values."""
        if mask is not None or observed(self.hook_attn_scores, self.hook_pattern):
            return self.mix_explicitly(q, k, v, mask)
        q, k = above_zero(q), above_zero(k)
        v = F.pad(v, (0, 1), value=1.0)  # whose sum is the denominator
        n_past = k.shape[1] - q.shape[1]
        products = "batch key head d_head, batch key head d_value -> {} head d_head d_value"
        past = einsum(k[:, :n_past], v[:, :n_past], products.format("batch"))
        new = einsum(k[:, n_past:], v[:, n_past:], products.format("batch key")).cumsum(dim=1)
        sums = einsum(
            q,
            past[:, None] + new,
            "batch query head d_head, batch query head d_head d_value -> batch query head d_value",
        )
        return sums[..., :-1] / sums[..., -1:]

    def mix_explicitly(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """The quadratic form. What is added to a softmax's scores is a factor here."""
        weights = einsum(
            above_zero(q),
            above_zero(k),
            "batch query head d_head, batch key head d_head -> batch head query key",
        )
        scores = self.hook_attn_scores(weights * added_mask(q, k, mask).exp())
        pattern = self.hook_pattern(scores / scores.sum(dim=-1, keepdim=True))
        return einsum(
            pattern, v, "batch head query key, batch key head d_head -> batch query head d_head"
        )


class GroupedQueryAttention(Attention):
    """Attention whose heads share keys and values in groups (Ainslie et al. 2023); of one group,
    by default, it is multi-query attention (Shazeer 2019).

    W_K, W_V [kv_head d_model d_head], b_K, b_V [kv_head d_head]: head h reads the keys and values
    h // (n_heads / n_kv_heads). `hook_k`, `hook_v` [batch pos kv_head d_head], and so is what a
    cache keeps. Given a stream for each head, they are those of each group's mean. Raises
    `ValueError` unless n_kv_heads divides n_heads.
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
        """Each query's average of its group's values."""
        group = q.shape[2] // self.n_kv_heads
        per_head = "batch key kv_head d_head -> batch key (kv_head group) d_head"
        return super().mix(
            q, repeat(k, per_head, group=group), repeat(v, per_head, group=group), mask
        )

    @torch.no_grad()
    def load_from(self, old: Attention) -> None:
        """Start from full attention: the mean of each group's keys and values (section 2.1)."""
        for name, parameter in self.named_parameters():
            groups = "(kept group) ... -> kept ..."
            parameter.copy_(reduce(old.get_parameter(name), groups, "mean", kept=len(parameter)))


class SdpaAttention(Attention):
    """`Attention`, always in one kernel, with no hook points of scores and pattern."""

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        del self.hook_attn_scores, self.hook_pattern

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Each query's average of the values, by `scaled_dot_product_attention`."""
        return mix_fused(q, k, v, mask)


class FlexAttention(SdpaAttention):
    """`Attention` in PyTorch's FlexAttention (Dong et al. 2024), with no hook points of scores and
    pattern: the place for another term of the scores.

    One kernel once the model is compiled; until then PyTorch takes an unfused form, with a warning.
    On a CPU it has no gradients and, compiled, takes no padding (PyTorch 2.13). Raises
    `ImportError` where PyTorch is too old to have it.
    """

    def __init__(self, cfg: Config):
        if flex is None:
            raise ImportError(
                f"FlexAttention needs PyTorch 2.5 or later, and this is {torch.__version__}; "
                "SdpaAttention computes the same"
            )
        super().__init__(cfg)

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Each query's average of the values, by `flex_attention`."""
        batch, n_queries, n_heads, _ = q.shape
        shape = (batch, n_heads, n_queries, k.shape[1])
        added = added_mask(q, k, mask).expand(shape)
        seen = flex.create_block_mask(
            lambda b, h, i, j: added[b, h, i, j] > -math.inf, *shape, device=q.device
        )
        q, k, v = (
            rearrange(x, "batch pos head d_head -> batch head pos d_head") for x in (q, k, v)
        )
        z = flex.flex_attention(q, k, v, lambda qk, b, h, i, j: qk + added[b, h, i, j], seen)
        return rearrange(z, "batch head pos d_head -> batch pos head d_head")


def added_mask(q: Queries, k: Keys, mask: Mask) -> Float[Tensor, "... query key"]:
    """The mask as what is added to the scores: −∞ where a query does not see a key."""
    mask = causal_mask(q, k) if mask is None else mask
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)


def above_zero(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """elu(x) + 1: x + 1 above 0, eˣ below, without the cancellation of (eˣ − 1) + 1."""
    return x.relu() + x.clamp(max=0).exp()
