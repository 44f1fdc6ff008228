"""Attention without a softmax, in time linear in the length of the text."""

import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from clean_transformer.hooks import observed
from clean_transformer.modules.attention import (
    Attention,
    Keys,
    Mask,
    Queries,
    average_values,
    dot_products,
)
from clean_transformer.variants.attention import added_mask


class LinearAttention(Attention):
    """Σⱼ φ(q)·φ(kⱼ) vⱼ / Σⱼ φ(q)·φ(kⱼ) over the past, with φ(x) = elu(x) + 1.

    Source: Katharopoulos et al. 2020, equations 7 and 9. The time is linear in length, because
    φ(k) vᵀ is summed over the keys before it meets q. These sums [batch pos head d_head d_head+1]
    are kept for every new position.

    The quadratic form is used while a hook observes scores or pattern, and with a mask, as for
    padding. `hook_attn_scores` sees φ(q)·φ(k), with 0 for keys that a query does not see.
    `hook_pattern` sees their shares, which sum to 1.
    """

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """For each query, the average of the values."""
        if mask is not None or observed(self.hook_attn_scores, self.hook_pattern):
            return self.mix_explicitly(q, k, v, mask)
        q, k = elu_plus_one(q), elu_plus_one(k)
        v = F.pad(v, (0, 1), value=1.0)  # the sum of this column is the denominator
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
        """The quadratic form. A number that a softmax's mask adds is here a factor, its exp."""
        weights = dot_products(elu_plus_one(q), elu_plus_one(k))
        scores = self.hook_attn_scores(weights * added_mask(q, k, mask).exp())
        pattern = self.hook_pattern(scores / scores.sum(dim=-1, keepdim=True))
        return average_values(pattern, v)


def elu_plus_one(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """elu(x) + 1: x + 1 above 0 and eˣ below, without the cancellation in (eˣ − 1) + 1."""
    return x.relu() + x.clamp(max=0).exp()
