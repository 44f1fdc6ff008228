"""Faults in attention's scale, mask and softmax."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clean_transformer.modules import attention as attention_module
from clean_transformer.modules.attention import Attention
from clean_transformer.parity.faults.semantic.edits import Changes, Edit, SemanticFault, unchanged
from clean_transformer.parity.operations.attention import attention


def masked(
    hides: Callable[[Tensor, Tensor], Tensor] = lambda query, key: key > query,
    fill: float = -math.inf,
) -> Edit:
    """Return a function that masks attention scores [... query key].

    The function sets a score to `fill` if `hides(query position, key position)` is True. The keys
    have the positions 0, 1, …, and the last query has the same position as the last key.
    """

    def mask(scores: Tensor) -> Tensor:
        n_queries, n_keys = scores.shape[-2:]
        position = torch.arange(n_keys, device=scores.device)
        return scores.masked_fill(hides(position[n_keys - n_queries :, None], position), fill)

    return mask


CAUSAL = masked()


def mixing(
    scale: Callable[[int, int], float] = lambda n_heads, d_head: math.sqrt(d_head),
    mask: Edit = CAUSAL,
    normalize: Edit = lambda scores: scores.softmax(-1),
) -> Changes:
    """Return the changes to our code that plant a fault in attention's scale, mask or softmax.

    `scale(n_heads, d_head)` returns the number by which the scores are divided. `mask` edits the
    scores, and `normalize` turns the masked scores into the attention pattern. The changes affect
    both methods with which `Attention` computes: `mix_explicitly` and `mix_fused`.
    """

    def mix(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: Tensor | None = None,
        see_scores: Edit = unchanged,
        see_pattern: Edit = unchanged,
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        seen = torch.ones((), dtype=torch.bool, device=q.device) if seen is None else seen
        factor = 1 / scale(q.shape[1], q.shape[-1])

        def see(scores: Tensor) -> Tensor:
            return see_pattern(normalize(see_scores(mask(scores))))

        return attention(q, k, v, seen, factor, see)[0].transpose(1, 2)

    def mix_explicitly(
        self: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        return mix(q, k, v, seen, self.hook_attn_scores, self.hook_pattern)

    return (
        (Attention, "mix_explicitly", lambda _: mix_explicitly),
        (attention_module, "mix_fused", lambda _: mix),
    )


ATTENTION_FAULTS = (
    SemanticFault(
        "scale-missing",
        "scores are not divided",
        "blocks.0.attn.hook_attn_scores",
        mixing(scale=lambda n_heads, d_head: 1),
    ),
    SemanticFault(
        "scale-d-head",
        "scores are divided by d_head",
        "blocks.0.attn.hook_attn_scores",
        mixing(scale=lambda n_heads, d_head: d_head),
    ),
    SemanticFault(
        "scale-d-model",
        "scores are divided by √d_model",
        "blocks.0.attn.hook_attn_scores",
        mixing(scale=lambda n_heads, d_head: math.sqrt(n_heads * d_head)),
    ),
    SemanticFault(
        "mask-missing",
        "every token sees all tokens",
        "blocks.0.attn.hook_attn_scores",
        mixing(mask=unchanged),
    ),
    SemanticFault(
        "mask-late",
        "every token sees the next one too",
        "blocks.0.attn.hook_attn_scores",
        mixing(mask=masked(lambda query, key: key > query + 1)),
    ),
    SemanticFault(
        "mask-early",
        "no token but the first sees itself",
        "blocks.0.attn.hook_attn_scores",
        mixing(mask=masked(lambda query, key: (key >= query) & (key > 0))),
    ),
    SemanticFault(
        "mask-reversed",
        "every token sees itself and what follows",
        "blocks.0.attn.hook_attn_scores",
        mixing(mask=masked(lambda query, key: key < query)),
    ),
    SemanticFault(
        "mask-finite",
        "masked scores are -10,000; their weights still come out as 0",
        "blocks.0.attn.hook_attn_scores",
        mixing(mask=masked(fill=-1e4)),
    ),
    SemanticFault(
        "mask-fills-zero",
        "masked scores are 0, not −∞",
        "blocks.0.attn.hook_attn_scores",
        mixing(mask=masked(fill=0.0)),
    ),
    SemanticFault(
        "mask-after-softmax",
        "the pattern is masked, and not the scores",
        "blocks.0.attn.hook_attn_scores",
        mixing(mask=unchanged, normalize=lambda scores: masked(fill=0.0)(scores.softmax(-1))),
    ),
    SemanticFault(
        "softmax-over-queries",
        "the columns of the pattern add up to one, not its rows",
        "blocks.0.attn.hook_pattern",
        mixing(normalize=lambda scores: scores.softmax(-2)),
    ),
    SemanticFault(
        "softmax-plus-one",
        "softmax adds one to its denominator",
        "blocks.0.attn.hook_pattern",
        mixing(normalize=lambda scores: F.pad(scores, (1, 0)).softmax(-1)[..., 1:]),
    ),
    SemanticFault(
        "softmax-float32",
        "softmax is computed in float32; no fault in a float32 model",
        "blocks.0.attn.hook_pattern",
        mixing(normalize=lambda scores: scores.float().softmax(-1).to(scores.dtype)),
    ),
)
