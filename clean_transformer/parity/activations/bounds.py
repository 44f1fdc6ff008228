"""Rules for how large the rounding error of each activation may be.

A rule says which kind of operation computes the activation, such as a matrix product, and computes
a number G for each element. The allowed error of an element is proportional to its G, which is
Σ|xW| for a sum Σ xW in float32. `parity/limits.py` has the limits for each kind, and the formulas
for G.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from clean_transformer.model import DemoTransformer
from clean_transformer.modules.attention import Attention, causal_mask, project
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.modules.embed import Embed
from clean_transformer.modules.layer_norm import LayerNorm, LayerNormPre
from clean_transformer.modules.mlp import MLP
from clean_transformer.modules.pos_embed import PosEmbed
from clean_transformer.modules.unembed import TiedUnembed, Unembed
from clean_transformer.parity.limits import (
    ADD,
    ATTEND,
    COPY,
    GELU,
    LAYER_NORM,
    LINEAR,
    SOFTMAX,
    Kind,
)
from clean_transformer.parity.operations.attention import attention
from clean_transformer.parity.scales import (
    Size,
    attention_squares,
    attention_terms,
    gelu_scale,
    layer_norm_scales,
    softmax_scale,
    square,
    sum_scale,
    typical_size,
)

# The device's activations of one module, converted to float64. The keys are "input", "input 1", …
# for the module's inputs, and the names of its hook points.
Seen = Mapping[str, Tensor]

# The kinds of operations that multiply matrices. Only these kinds may run in TF32 or in the
# autocast dtype. In half precision, `sum_scale` computes their G with another formula.
PRODUCTS = (LINEAR, ATTEND)


@dataclass(frozen=True)
class Rule:
    """How large the rounding error of an activation may be.

    `kind` is the kind of operation that computes the activation. The other fields are functions.
    Their first argument is the module that computes the activation. Their second argument, `seen`,
    maps names to the inputs and activations of this module, as the device computed them.

    `summed` returns the number of terms that the operation adds up. If `kind` is in PRODUCTS, the
    operation is a sum Σ xW: `terms(module, seen, abs)` returns Σ|xW|, and `terms(module, seen,
    square)` returns Σ(xW)². For other kinds, `terms` returns G (see `scale`). If `squares`
    is not None, the method `typical` uses the result of `squares` instead of Σ(xW)².
    """

    kind: Kind
    terms: Callable[[Any, Seen, Size], Tensor]
    summed: Callable[[Any, Seen], int] = lambda module, seen: 1
    squares: Callable[[Any, Seen], Tensor] | None = None

    def scale(self, module: nn.Module, seen: Seen, exact: Tensor, u: float) -> Tensor:
        """Return G for each element. The allowed error of an element is proportional to its G.

        `exact` is the exact activation. `u` is the unit roundoff of the device's dtype.
        """
        terms = partial(self.terms, module, seen)
        return sum_scale(exact, terms, u) if self.kind in PRODUCTS else terms(abs)

    def typical(self, module: nn.Module, seen: Seen, exact: Tensor) -> Tensor:
        """Return |exact| + √Σ(xW)². A typical error is this value times the unit roundoff."""
        squares = self.squares(module, seen) if self.squares else self.terms(module, seen, square)
        return typical_size(exact, squares)


def _exact(module: nn.Module, seen: Seen, size: Size) -> Tensor:
    return torch.ones(())


def _layer_norm_scale(module: LayerNormPre, seen: Seen, size: Size) -> Tensor:
    return layer_norm_scales(seen["input"], module.eps)[2]


def _layer_norm(module: LayerNormPre, seen: Seen, size: Size) -> Tensor:
    return layer_norm_scales(seen["input"], module.eps)[0]


def _layer_norm_output(module: LayerNorm, seen: Seen, size: Size) -> Tensor:
    return _layer_norm(module, seen, size) * module.w.abs() + module.b.abs()


def _projection(source: str, letter: str) -> Callable[[Attention, Seen, Size], Tensor]:
    def terms(module: Attention, seen: Seen, size: Size) -> Tensor:
        W, b = getattr(module, f"W_{letter}"), getattr(module, f"b_{letter}")
        return project(size(seen.get(source, seen["input"])), size(W), size(b))

    return terms


def _scores(module: Attention, seen: Seen, size: Size) -> Tensor:
    q, k = (seen[name].transpose(1, 2) for name in ("hook_q", "hook_k"))
    return size(q / math.sqrt(q.shape[-1])) @ size(k).mT


def _pattern(module: Attention, seen: Seen, size: Size) -> Tensor:
    scores = seen["hook_attn_scores"]
    return softmax_scale(scores.softmax(dim=-1), scores, -1)


def _z(module: Attention, seen: Seen, size: Size) -> Tensor:
    v = seen["hook_v"].transpose(1, 2)
    if "hook_pattern" in seen:
        terms = size(seen["hook_pattern"]) @ size(v)
    else:
        terms = attention_terms(_fused_pattern(seen), _scores(module, seen, abs), v, size)
    return terms.transpose(1, 2)


def _z_squares(module: Attention, seen: Seen) -> Tensor:
    if "hook_pattern" in seen:
        return _z(module, seen, square)
    v = seen["hook_v"].transpose(1, 2)
    scores = _scores(module, seen, lambda x: x)
    return attention_squares(_fused_pattern(seen), scores, v).transpose(1, 2)


def _fused_pattern(seen: Seen) -> Tensor:
    mask = causal_mask(seen["hook_q"], seen["hook_k"])
    q, k, v = (seen[name].transpose(1, 2) for name in ("hook_q", "hook_k", "hook_v"))
    return attention(q, k, v, mask, q.shape[-1] ** -0.5)[1]


def _result(module: Attention, seen: Seen, size: Size) -> Tensor:
    pairs = "batch pos head d_head, head d_head d_model -> batch pos head d_model"
    return einsum(size(seen["hook_z"]), size(module.W_O), pairs)


def _attn_out(module: Attention, seen: Seen, size: Size) -> Tensor:
    if "hook_result" in seen:
        return size(seen["hook_result"]).sum(dim=2) + size(module.b_O)
    # One product for all heads, because the terms of single heads need much memory.
    z, W_O = size(seen["hook_z"]).flatten(start_dim=2), size(module.W_O).flatten(end_dim=1)
    return z @ W_O + size(module.b_O)


def _matrix(source: str, W: str, b: str) -> Callable[[Any, Seen, Size], Tensor]:
    def terms(module: Any, seen: Seen, size: Size) -> Tensor:
        return size(seen[source]) @ size(getattr(module, W)) + size(getattr(module, b))

    return terms


def _gelu(module: MLP, seen: Seen, size: Size) -> Tensor:
    return gelu_scale(seen["hook_pre"])


def _sum(*names: str) -> Callable[[TransformerBlock, Seen, Size], Tensor]:
    return lambda module, seen, size: sum((seen[name].abs() for name in names), torch.zeros(()))


def _rows_of_weight(name: str) -> Callable[[Any, Seen], int]:
    return lambda module, seen: int(getattr(module, name).shape[-2])


def _keys(module: Attention, seen: Seen) -> int:
    return int(seen["hook_k"].shape[1])


_LAYER_NORM_PRE = {
    "hook_scale": Rule(LAYER_NORM, _layer_norm_scale),
    "hook_normalized": Rule(LAYER_NORM, _layer_norm),
    "output": Rule(LAYER_NORM, _layer_norm),
}


_UNEMBED = {
    "hook_in": Rule(COPY, _exact),
    "hook_out": Rule(LINEAR, _matrix("hook_in", "W_U", "b_U"), _rows_of_weight("W_U")),
    "output": Rule(COPY, _exact),
}


RULES: dict[type[nn.Module], dict[str, Rule]] = {
    Embed: {"output": Rule(COPY, _exact)},
    PosEmbed: {"output": Rule(COPY, _exact)},
    LayerNormPre: _LAYER_NORM_PRE,
    LayerNorm: _LAYER_NORM_PRE | {"output": Rule(LAYER_NORM, _layer_norm_output)},
    Attention: {
        "hook_q": Rule(LINEAR, _projection("input", "Q"), _rows_of_weight("W_Q")),
        "hook_k": Rule(LINEAR, _projection("input 1", "K"), _rows_of_weight("W_K")),
        "hook_v": Rule(LINEAR, _projection("input 2", "V"), _rows_of_weight("W_V")),
        "hook_attn_scores": Rule(LINEAR, _scores, _rows_of_weight("W_O")),
        "hook_pattern": Rule(SOFTMAX, _pattern, _keys),
        "hook_z": Rule(ATTEND, _z, _keys, _z_squares),
        "hook_result": Rule(LINEAR, _result, _rows_of_weight("W_O")),
        "output": Rule(LINEAR, _attn_out, lambda module, seen: math.prod(module.W_O.shape[:2])),
    },
    MLP: {
        "hook_pre": Rule(LINEAR, _matrix("input", "W_in", "b_in"), _rows_of_weight("W_in")),
        "hook_post": Rule(GELU, _gelu),
        "output": Rule(LINEAR, _matrix("hook_post", "W_out", "b_out"), _rows_of_weight("W_out")),
    },
    TransformerBlock: {
        # In the first block, the device has rounded this activation: it is the sum of the token
        # embedding and the position embedding.
        "hook_resid_pre": Rule(ADD, _sum("hook_resid_pre")),
        "hook_attn_in": Rule(COPY, _exact),
        "hook_q_input": Rule(COPY, _exact),
        "hook_k_input": Rule(COPY, _exact),
        "hook_v_input": Rule(COPY, _exact),
        "hook_attn_out": Rule(COPY, _exact),
        "hook_resid_mid": Rule(ADD, _sum("hook_resid_pre", "hook_attn_out")),
        "hook_mlp_in": Rule(COPY, _exact),
        "hook_mlp_out": Rule(COPY, _exact),
        "hook_resid_post": Rule(ADD, _sum("hook_resid_mid", "hook_mlp_out")),
        "output": Rule(COPY, _exact),
    },
    Unembed: _UNEMBED,
    TiedUnembed: _UNEMBED,
    DemoTransformer: {},
}


def formula_of(module: nn.Module) -> dict[str, Rule] | None:
    """Return the rules for the module's activations, or None if there are no rules for its class.

    The keys are names of hook points, or "output" for the module's output. The rules of a class in
    RULES also apply to a subclass that replaces no method except `__init__`.
    """
    kind = type(module)
    parents = (parent for parent in kind.__mro__ if parent in RULES)
    return next((RULES[each] for each in parents if _is_same(kind, each)), None)


def _is_same(kind: type, parent: type) -> bool:
    """Whether `kind` inherits every method of `parent` unchanged, except `__init__`."""
    methods = (name for name, value in vars(parent).items() if callable(value))
    return all(
        getattr(kind, name) is getattr(parent, name) for name in methods if name != "__init__"
    )


# The rule for hook points without a rule in RULES. These are the hook points of `DemoTransformer`
# itself, which return the output of a submodule unchanged.
PASSED_ON = Rule(COPY, _exact)
