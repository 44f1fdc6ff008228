"""Finds weights and activations that are too large for a dtype, such as float16."""

from functools import partial

import torch
from torch import Tensor

from clean_transformer.hooks import HookPoint
from clean_transformer.parity.inputs import Tokens, Weights, suite_tokens
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.weights.table import State

# In a half-precision model, LayerNorm computes these activations in float32.
IN_FLOAT32 = ("hook_scale", "hook_normalized")


def overflow(weights: Weights, dtype: torch.dtype) -> str:
    """Say which weight or activation is too large for the dtype. Return "" if all of them fit."""
    reason = overflowing_weight(weights.state, dtype)
    if torch.finfo(dtype).max < torch.finfo(torch.bfloat16).max:  # only float16
        exact = ExactParts(weights.cfg, weights.state, dtype)
        for tokens in (suite_tokens(weights.cfg), suite_tokens(weights.cfg, 1, weights.cfg.n_ctx)):
            reason = reason or overflowing_activation(exact, tokens)
    return reason


def overflowing_weight(state: State, dtype: torch.dtype) -> str:
    """Return a sentence about the first weight that is too large for `dtype`, or "" if all fit.

    A weight is too large if all its elements are finite, but an element becomes infinite in
    `dtype`.
    """
    for name, weight in state.items():
        if weight.to(dtype).isinf().any() and weight.isfinite().all():
            return too_large(f"the weight {name}", float(weight.abs().max()), dtype)
    return ""


@torch.no_grad()
def overflowing_activation(exact: ExactParts, tokens: Tokens) -> str:
    """Return a sentence about the first activation that is too large for the dtype `exact.dtype`.

    Returns "" if all activations fit. The model runs on `tokens` in float64 on the CPU, one block
    at a time. An activation is too large if an element is finite in float64, but becomes infinite
    in `exact.dtype`.
    """
    found: list[str] = []

    def watch(name: str, _: object, args: object, value: Tensor) -> None:
        if name.endswith("hook_attn_scores"):
            # Attention computes q kᵀ first, and divides by √d_head afterwards.
            look(f"{name} before its division by √d_head", value * exact.cfg.d_head**0.5)
        look(name, value)

    def look(name: str, value: Tensor) -> None:
        rounded = value.to(exact.dtype)
        if not found and bool((rounded.isinf() & value.isfinite()).any()):
            largest = value[value.isfinite()].abs().max()
            found.append(too_large(f"the activation {name}", float(largest), exact.dtype))

    with trusted():
        residual = sum(exact.embeddings(tokens, None), torch.zeros(()))
        look("hook_embed + hook_pos_embed", residual)
        for path in (f"blocks.{layer}" for layer in range(exact.cfg.n_layers)):
            module = exact.module(path)
            for name, point in module.named_modules():
                if isinstance(point, HookPoint) and not name.endswith(IN_FLOAT32):
                    point.register_forward_hook(partial(watch, f"{path}.{name}"))
            residual = module(residual)
            if found:
                return found[0]
        normalized = exact.module("ln_final")(residual)
        look("ln_final", normalized)
        for W_U, b_U in map(exact.unembedding, exact.vocabulary()):
            look("logits", normalized @ W_U + b_U)
    return found[0] if found else ""


def too_large(what: str, size: float, dtype: torch.dtype) -> str:
    """Return a sentence that says: `what` has the value `size`, which is too large for `dtype`."""
    name, limit = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    return (
        f"this model does not fit into {name}: {what} reaches {size:.6g}, and the largest number "
        f"in {name} is {limit:.6g}"
    )
