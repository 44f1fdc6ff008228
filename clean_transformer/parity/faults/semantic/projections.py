"""Faults in the weights and biases of attention: W_Q, W_K, W_V, W_O, b_Q, b_K, b_V and b_O."""

from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor

from clean_transformer.modules.attention import Attention
from clean_transformer.parity.faults.semantic.edits import (
    SemanticFault,
    edited,
    element,
    mistaken,
    parameters,
    reread,
    without,
)


def input_transposed(weight: Tensor) -> Tensor:
    """Transpose W_Q, W_K or W_V as one square matrix [d_model (head d_head)] over all heads."""
    merged = rearrange(weight, "head d_model d_head -> d_model (head d_head)")
    return rearrange(merged.T, "d_model (head d_head) -> head d_model d_head", head=len(weight))


def output_transposed(weight: Tensor) -> Tensor:
    """Transpose W_O as one square matrix [(head d_head) d_model] over all heads."""
    merged = rearrange(weight, "head d_head d_model -> (head d_head) d_model")
    return rearrange(merged.T, "(head d_head) d_model -> head d_head d_model", head=len(weight))


def interleaved(module: Any) -> dict[str, Tensor]:
    """Return W_Q, W_K, W_V and their biases, split wrongly from GPT-2's joint weight.

    GPT-2's files store one joint weight: first the queries of all heads, then the keys of all
    heads, then the values of all heads. With this mistake, the heads 0, 3, 6, … of the joint weight
    become queries, the heads 1, 4, 7, … become keys, and the heads 2, 5, 8, … become values.
    """
    fused = {kind: torch.cat([getattr(module, f"{kind}_{x}") for x in "QKV"]) for kind in "Wb"}
    return {f"{kind}_{x}": fused[kind][place::3] for kind in "Wb" for place, x in enumerate("QKV")}


def value_bias_folded(module: Any) -> dict[str, Tensor]:
    """Return b_O + b_V W_O as the new b_O.

    The model then counts b_V twice, because it still adds b_V to the values.
    """
    share = einsum(module.b_V, module.W_O, "head d_head, head d_head d_model -> d_model")
    return {"b_O": module.b_O + share}


PROJECTION_FAULTS = (
    SemanticFault(
        "query-bias-missing",
        "b_Q is not added",
        "blocks.0.attn.hook_q",
        edited(Attention, without("b_Q")),
    ),
    SemanticFault(
        "key-bias-missing",
        "b_K is not added; it shifts all scores of a query alike, so that softmax hides it",
        "blocks.0.attn.hook_k",
        edited(Attention, without("b_K")),
    ),
    SemanticFault(
        "value-bias-missing",
        "b_V is not added",
        "blocks.0.attn.hook_v",
        edited(Attention, without("b_V")),
    ),
    SemanticFault(
        "query-key-biases-swapped",
        "b_Q and b_K are exchanged",
        "blocks.0.attn.hook_q",
        mistaken(Attention, {"b_Q": "b_K", "b_K": "b_Q"}),
    ),
    SemanticFault(
        "queries-keys-swapped",
        "queries are made with the weights of keys, keys with those of queries",
        "blocks.0.attn.hook_q",
        mistaken(Attention, {"W_Q": "W_K", "W_K": "W_Q", "b_Q": "b_K", "b_K": "b_Q"}),
    ),
    SemanticFault(
        "keys-values-swapped",
        "keys are made with the weights of values, values with those of keys",
        "blocks.0.attn.hook_k",
        mistaken(Attention, {"W_K": "W_V", "W_V": "W_K", "b_K": "b_V", "b_V": "b_K"}),
    ),
    SemanticFault(
        "qkv-interleaved",
        "queries, keys and values are split head by head, as in GPT-NeoX",
        "blocks.0.attn.hook_q",
        parameters(Attention, interleaved),
    ),
    SemanticFault(
        "query-weight-transposed",
        "W_Q is transposed, as one square matrix over all heads",
        "blocks.0.attn.hook_q",
        edited(Attention, {"W_Q": input_transposed}),
    ),
    SemanticFault(
        "value-bias-transposed",
        "b_V is read with its two axes exchanged",
        "blocks.0.attn.hook_v",
        edited(Attention, {"b_V": reread}),
    ),
    SemanticFault(
        "value-heads-reversed",
        "the heads' values are in the opposite order",
        "blocks.0.attn.hook_v",
        edited(Attention, dict.fromkeys(("W_V", "b_V"), lambda weight: weight.flip(0))),
    ),
    SemanticFault(
        "output-bias-missing",
        "b_O is not added",
        "blocks.0.hook_attn_out",
        edited(Attention, without("b_O")),
    ),
    SemanticFault(
        "output-weight-transposed",
        "W_O is transposed, as one square matrix over all heads",
        "blocks.0.hook_attn_out",
        edited(Attention, {"W_O": output_transposed}),
    ),
    SemanticFault(
        "heads-permuted",
        "each head's output goes through the next head's W_O",
        "blocks.0.hook_attn_out",
        edited(Attention, {"W_O": lambda W_O: W_O.roll(1, 0)}),
    ),
    SemanticFault(
        "one-head-scaled",
        "the first head's output is 1% too large",
        "blocks.0.hook_attn_out",
        edited(Attention, {"W_O": element(lambda head: head * 1.01, 0)}),
    ),
    SemanticFault(
        "one-head-dead",
        "the last head's output is lost",
        "blocks.0.hook_attn_out",
        edited(Attention, {"W_O": element(torch.zeros_like, -1)}),
    ),
    SemanticFault(
        "value-bias-folded-twice",
        "b_V is folded into b_O and yet added to the values",
        "blocks.0.hook_attn_out",
        parameters(Attention, value_bias_folded),
    ),
)
