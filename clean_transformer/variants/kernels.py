"""The same attention in a particular fused kernel."""

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
    """`Attention` that always uses `scaled_dot_product_attention`.

    It has no hook points for scores and pattern.
    """

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        del self.hook_attn_scores, self.hook_pattern

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """For each query, the average of the values."""
        return mix_fused(q, k, v, mask)


class FlexAttention(SdpaAttention):
    """`Attention` by PyTorch's `flex_attention` (Dong et al. 2024).

    Change its function of the scores to try another score. It has no hook points for scores and
    pattern. It is one kernel once the model is compiled; before, PyTorch uses an unfused form and
    warns. On a CPU it has no gradients and, compiled, takes no padding (PyTorch 2.13). Raises
    `ImportError` if PyTorch is too old to have it.
    """

    def __init__(self, cfg: Config):
        if flex is None:
            raise ImportError(
                f"FlexAttention needs PyTorch 2.5 or later, and this is {torch.__version__}; "
                "SdpaAttention computes the same"
            )
        super().__init__(cfg)

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """For each query, the average of the values."""
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
