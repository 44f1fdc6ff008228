"""Causal multi-head self-attention (Vaswani et al. 2017)."""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clean_transformer.config import Config, ConfigLike
from clean_transformer.hooks import HookedModule, HookPoint, observed
from clean_transformer.kv_cache import LayerCache
from clean_transformer.modules.linear import affine, normal, output_std
from clean_transformer.weights.stacked import HeadCircuits

Residual = Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch pos head d_model"]
Queries = Float[Tensor, "batch query head d_head"]
Keys = Float[Tensor, "batch key head d_head"]
# A boolean mask is True where a query sees a key. A float mask holds numbers that are added to the
# scores. If the mask is None, each query sees the keys up to its own position.
Mask = Bool[Tensor, "... query key"] | Float[Tensor, "... query key"] | None


class Attention(HookedModule, HeadCircuits):
    """Σ softmax(q kᵀ / √d_head) v W_O + b_O, where the sum is over the heads.

    Source: Vaswani et al. 2017, equation 1. Parameters: W_Q, W_K, W_V [head d_model d_head], W_O
    [head d_head d_model], b_Q, b_K, b_V [head d_head], b_O [d_model].

    Three activations are computed only while their hook points have hooks. `hook_attn_scores` and
    `hook_pattern` get the scores before and after the softmax [batch head query key]. `hook_result`
    gets each head's term of the sum over the heads, without b_O [batch pos head d_model].
    """

    # Whether `forward` takes `key_input` and `value_input`. `swap` sets this attribute on every new
    # attention module.
    takes_per_head_inputs = True

    def __init__(self, cfg: ConfigLike):
        super().__init__()
        self.cfg = cfg = Config.of(cfg)
        self.W_Q = input_weight(cfg)
        self.W_K = input_weight(cfg)
        self.W_V = input_weight(cfg)
        self.W_O = normal(cfg.n_heads, cfg.d_head, cfg.d_model, std=output_std(cfg))
        self.b_Q = nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_head))
        self.b_K = nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_head))
        self.b_V = nn.Parameter(torch.zeros(cfg.n_heads, cfg.d_head))
        self.b_O = nn.Parameter(torch.zeros(cfg.d_model))

        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()
        self.hook_z = HookPoint()
        self.hook_result = HookPoint()

    def forward(
        self,
        query_input: Residual,
        key_input: Residual | None = None,
        value_input: Residual | None = None,
        kv_cache: LayerCache | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the attention output, which the block adds to the residual stream.

        `key_input` and `value_input` default to `query_input`. An input of shape
        [batch pos head d_model] holds a separate input for each head. With `kv_cache`, the inputs
        belong to the positions that follow the cached positions.
        """
        key_input = query_input if key_input is None else key_input
        value_input = query_input if value_input is None else value_input

        q = self.hook_q(project(query_input, self.W_Q, self.b_Q))
        k = self.hook_k(project(key_input, self.W_K, self.b_K))
        v = self.hook_v(project(value_input, self.W_V, self.b_V))

        mask = None
        if kv_cache is not None:
            mask = kv_cache.mask(q.shape[1])
            k, v = kv_cache.append(k, v)
        z = self.hook_z(self.mix(q, k, v, mask))

        if observed(self.hook_result):
            per_head = einsum(
                z, self.W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model"
            )
            result = self.hook_result(per_head)
            return reduce(result, "batch pos head d_model -> batch pos d_model", "sum") + self.b_O
        return affine(z.flatten(start_dim=2), self.W_O.flatten(end_dim=1), self.b_O)

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Return, for each query, the average of the values weighted by the attention pattern.

        If there are fewer queries than keys, the queries belong to the last positions of the keys.
        """
        if observed(self.hook_attn_scores, self.hook_pattern):
            return self.mix_explicitly(q, k, v, mask)
        return mix_fused(q, k, v, mask)

    def mix_explicitly(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Average the values step by step. Scores and pattern pass through their hook points."""
        scores = dot_products(q, k) / math.sqrt(q.shape[-1])
        if mask is None:
            mask = causal_mask(q, k)
        masked = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        pattern = self.hook_pattern(self.hook_attn_scores(masked).softmax(dim=-1))
        return average_values(pattern, v)


def dot_products(q: Queries, k: Keys) -> Float[Tensor, "batch head query key"]:
    """Return the dot product of each query with each key."""
    return einsum(q, k, "batch query head d_head, batch key head d_head -> batch head query key")


def average_values(pattern: Float[Tensor, "batch head query key"], v: Keys) -> Queries:
    """Return, for each query, the sum of the values weighted by the attention pattern."""
    return einsum(
        pattern, v, "batch head query key, batch key head d_head -> batch query head d_head"
    )


def input_weight(cfg: Config) -> nn.Parameter:
    """Return a randomly initialized W_Q, W_K or W_V [head d_model d_head]."""
    # The layout in memory is [d_model head d_head], so that `project` can merge the heads into one
    # matrix without a copy.
    weight = normal(cfg.d_model, cfg.n_heads, cfg.d_head, std=cfg.initializer_range)
    return nn.Parameter(weight.detach().permute(1, 0, 2))


def causal_mask(q: Queries, k: Keys) -> Bool[Tensor, "query key"]:
    """Return a mask that is True where the key's position is not after the query's position.

    If there are fewer queries than keys, the queries belong to the last positions of the keys.
    """
    n_queries, n_keys = q.shape[1], k.shape[1]
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device)
    return seen.tril(diagonal=n_keys - n_queries)


def mix_fused(q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
    """Return each query's weighted average of the values from one kernel that stores no pattern."""
    # With `is_causal`, the kernel assumes that the first query and the first key have the same
    # position. This is true only if there are as many queries as keys. A single query at the last
    # position sees every key, so it needs no mask.
    # The condition is an `if`, because `torch.jit.trace` compares shapes as tensors.
    is_causal = False
    if mask is None and q.shape[1] == k.shape[1]:
        is_causal = True
    elif mask is None and q.shape[1] > 1:
        mask = causal_mask(q, k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [batch head pos d_head]
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    return z.transpose(1, 2)


def project(
    x: Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch pos stream d_model"],
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """Return x W + b for every head.

    If x is [batch pos stream d_model], each stream is the input of one query head. In grouped-query
    attention, W has fewer heads than x has streams. The streams are then divided into equal groups
    of neighbors, and each head of W gets the mean of one group.
    """
    if x.ndim == 4:
        groups = "batch pos (head group) d_model -> batch pos head d_model"
        per_head = "batch pos head d_model, head d_model d_head -> batch pos head d_head"
        return einsum(reduce(x, groups, "mean", head=len(W)), W, per_head) + b
    merged = affine(x, rearrange(W, "head d_model d_head -> d_model (head d_head)"), b.flatten())
    return merged.view(*x.shape[:-1], *b.shape)
