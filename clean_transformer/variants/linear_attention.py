"""Attention without a softmax. Its running time is linear in the length of the text."""

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
    """Σⱼ φ(q)·φ(kⱼ) vⱼ / Σⱼ φ(q)·φ(kⱼ), with φ(x) = elu(x) + 1, over all keys j up to the query.

    Source: Katharopoulos et al. 2020, equations 7 and 9. The running time is linear in the number
    of positions, because φ(k) vᵀ is first summed over the keys, and the sum is then multiplied by
    φ(q). The sums for all new positions [batch pos head d_head d_head+1] are in memory at the same
    time.

    In two cases, the module computes the scores of all pairs of query and key, in quadratic time:
    if `hook_attn_scores` or `hook_pattern` has hooks, or if there is a mask, for example because of
    padding. `hook_attn_scores` gets φ(q)·φ(k), and 0 for keys that a query does not see.
    `hook_pattern` gets the scores of each query divided by their sum.
    """

    def mix(self, q: Queries, k: Keys, v: Keys, mask: Mask = None) -> Queries:
        """Return, for each query, the average of the values weighted by φ(q)·φ(k)."""
        if mask is not None or observed(self.hook_attn_scores, self.hook_pattern):
            return self.mix_explicitly(q, k, v, mask)
        q, k = elu_plus_one(q), elu_plus_one(k)
        v = F.pad(v, (0, 1), value=1.0)  # the sum over this column of ones is the denominator
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
        """Average the values in quadratic time. Scores and pattern pass through their hook points.

        In `Attention`, a float mask is added to the scores, and the softmax then computes
        exp(score + mask) = exp(score) · exp(mask). Here, there is no softmax, so the scores are
        multiplied by exp(mask).
        """
        weights = dot_products(elu_plus_one(q), elu_plus_one(k))
        scores = self.hook_attn_scores(weights * added_mask(q, k, mask).exp())
        pattern = self.hook_pattern(scores / scores.sum(dim=-1, keepdim=True))
        return average_values(pattern, v)


def elu_plus_one(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return elu(x) + 1: x + 1 for x > 0, else eˣ, without the rounding error of (eˣ − 1) + 1."""
    return x.relu() + x.clamp(max=0).exp()
