"""Modules that compute the same output as `Attention`, each with one function of PyTorch."""

import math

import torch
from einops import rearrange

from clean_transformer.config import Config
from clean_transformer.modules.attention import Attention, Keys, Mask, Queries, mix_fused
from clean_transformer.variants.attention import added_mask

try:
    from torch.nn.attention import flex_attention as flex
except ImportError:  # before PyTorch 2.5
    flex = None  # type: ignore[assignment, unused-ignore]


class SdpaAttention(Attention):
    """An `Attention` that always uses `torch.nn.functional.scaled_dot_product_attention`.

    This module has no hook points for scores and pattern.
    """

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        del self.hook_attn_scores, self.hook_pattern

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Return, for each query, the average of the values weighted by the attention pattern."""
        return mix_fused(q, k, v, mask)


class FlexAttention(SdpaAttention):
    """An `Attention` that uses PyTorch's `flex_attention` (Dong et al. 2024).

    To try other scores, change the lambda that `mix` passes to `flex_attention`: it gets a score
    `qk` and returns the new score. This module has no hook points for scores and pattern. In a
    compiled model, `flex_attention` is one fused kernel. In a model that is not compiled, PyTorch
    runs an unfused version and warns. On a CPU (PyTorch 2.13), `flex_attention` has no gradients,
    and its compiled kernel does not support padding. Raises `ImportError` if PyTorch is older than
    2.5 and has no `flex_attention`.
    """

    def __init__(self, cfg: Config):
        if flex is None:
            raise ImportError(
                f"FlexAttention needs PyTorch 2.5 or later, and this is {torch.__version__}; "
                "SdpaAttention computes the same"
            )
        super().__init__(cfg)

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Return, for each query, the average of the values weighted by the attention pattern."""
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
