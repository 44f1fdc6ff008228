"""GPT-2's forward pass in NumPy, to check PyTorch's results without a kernel of PyTorch.

`weights` maps our parameter names to float64 arrays. In the function of a module, such as `mlp`,
the names are relative to this module, such as "W_in". `x` is [pos d_model], without a batch axis.
The matrix products run in NumPy's BLAS. LayerNorm, softmax and GELU use only elementary functions
of NumPy, such as add, multiply, exp and tanh.
"""

from collections.abc import Mapping
from math import pi, sqrt

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, Array]
# The indices of some positions, or ALL.
Rows = NDArray[np.int64] | slice
ALL = slice(None)


def gpt2(tokens: NDArray[np.int64], weights: Weights, n_layers: int, eps: float) -> Array:
    """Return the logits [pos d_vocab] of the model for the ids `tokens` [pos]."""
    x = weights["embed.W_E"][tokens] + weights["pos_embed.W_pos"][: len(tokens)]
    for layer in range(n_layers):
        x = block(x, within(weights, f"blocks.{layer}"), eps)
    x = layer_norm(x, within(weights, "ln_final"), eps)
    W_U = weights.get("unembed.W_U", weights["embed.W_E"].T)
    return linear(x, W_U, weights["unembed.b_U"])


def block(x: Array, weights: Weights, eps: float, rows: Rows = ALL) -> Array:
    """Return the residual stream after a block: add attn(ln1(x)) to x, then add mlp(ln2(x)).

    If `rows` is given, only the results at these positions are computed.
    """
    normalized = layer_norm(x, within(weights, "ln1"), eps)
    x = x[rows] + attention(normalized, within(weights, "attn"), rows)
    return x + mlp(layer_norm(x, within(weights, "ln2"), eps), within(weights, "mlp"))


def attention(x: Array, weights: Weights, rows: Rows = ALL) -> Array:
    """Return Σ z W_O + b_O [pos d_model] at the positions `rows`, where Σ is over the heads.

    Each head computes z = softmax(q kᵀ / √d_head + mask) v. Only the queries at the positions
    `rows` are computed. Each query sees the keys and values up to its own position.
    """
    mask = np.where(np.tri(len(x), dtype=bool)[rows], 0.0, -np.inf)  # [query key]
    out = np.zeros_like(x[rows]) + weights["b_O"]
    for head, W_O in enumerate(weights["W_O"]):
        W_Q, W_K, W_V, b_Q, b_K, b_V = (
            weights[f"{kind}_{name}"][head] for kind in "Wb" for name in "QKV"
        )
        q, k, v = linear(x[rows], W_Q, b_Q), linear(x, W_K, b_K), linear(x, W_V, b_V)
        out += softmax(q @ k.T / sqrt(q.shape[-1]) + mask) @ v @ W_O
    return out


def mlp(x: Array, weights: Weights) -> Array:
    """Return gelu(x W_in + b_in) W_out + b_out."""
    return linear(
        gelu(linear(x, weights["W_in"], weights["b_in"])), weights["W_out"], weights["b_out"]
    )


def layer_norm(x: Array, weights: Weights, eps: float) -> Array:
    """Return (x - mean) / √(var + eps) · w + b.

    If `weights` has no w and b, because they were folded into the next layer, w is 1 and b is 0.
    """
    centered = x - x.mean(-1, keepdims=True)
    normalized = centered / np.sqrt((centered * centered).mean(-1, keepdims=True) + eps)
    return normalized * weights.get("w", 1.0) + weights.get("b", 0.0)


def softmax(scores: Array) -> Array:
    """Return exp(s - max s) of each row of scores s, divided by the sum of this row."""
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def gelu(x: Array) -> Array:
    """Return GPT-2's tanh form of GELU: ½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    return 0.5 * x * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x)))


def linear(x: Array, W: Array, b: Array) -> Array:
    """Return x W + b."""
    return x @ W + b


def within(weights: Weights, module: str) -> dict[str, Array]:
    """Return the weights whose names start with `module` and a dot, without this prefix."""
    prefix = f"{module}."
    return {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        if name.startswith(prefix)
    }
