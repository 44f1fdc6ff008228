"""How large a rounding error may be: a scale G for every activation, elementwise.

An error is judged as the dimensionless ratio |device - exact| / (u G), where `exact` is computed
in float64 from the device's own inputs and u is the unit roundoff: the test ratios of BLAS's DMMCH
and LAPACK (Dongarra et al. 1990; Higham, Accuracy and Stability of Numerical Algorithms, §3.1).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, reduce
from torch import Tensor, nn

from clean_transformer.modules.attention import Attention, project
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.modules.embed import Embed
from clean_transformer.modules.layer_norm import LayerNorm, LayerNormPre
from clean_transformer.modules.mlp import MLP
from clean_transformer.modules.pos_embed import PosEmbed
from clean_transformer.modules.unembed import TiedUnembed, Unembed

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# What a float32 matrix product is computed in where a setting allows it, by unit roundoff.
LOWER_PRECISION = {2.0**-11: "TF32", 2.0**-8: "bfloat16"}

# A module's activations in float64, as the device gave them: "input" (and "input 1", …), hook
# points by name, "output".
Seen = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of operation, and the largest ratio that a healthy device has and any device may have.

    `wrong` is None where the second is the summed length k, from γ_k = k u / (1 - k u). Sums of
    terms of one sign, such as an average, gather errors like √k: `healthy_per_root` is λ in the
    probabilistic bound λ √k u, which one rounding exceeds with probability 2 exp(-λ²/2) (Higham
    and Mary 2019, theorem 2.4): at λ = 8, 3e-14, less than one in all the sums of a run.
    """

    name: str
    healthy: float
    wrong: float | None
    healthy_per_root: float = 0.0

    def healthy_ratio(self, summed: int) -> float:
        """The largest ratio that passes, for a sum of that many terms."""
        return max(self.healthy, self.healthy_per_root * math.sqrt(summed))

    def wrong_ratio(self, summed: int) -> float:
        """The ratio above which no order of rounding explains the error."""
        return max(self.healthy_ratio(summed), summed if self.wrong is None else self.wrong)


COPY = Kind("gather, copy, mask", 0, 0)
ADD = Kind("residual add", 1, 2)
LINEAR = Kind("linear", 30, None)
SOFTMAX = Kind("softmax", 30, None, healthy_per_root=8)
LAYER_NORM = Kind("layer norm", 30, 300)
GELU = Kind("gelu_new", 16, 160)
ATTEND = Kind("attention", 30, None, healthy_per_root=8)


@dataclass(frozen=True)
class Rule:
    """The kind of operation that makes an activation, its G, and how many terms it sums."""

    kind: Kind
    scale: Callable[[Any, Seen], Tensor]
    summed: Callable[[Any, Seen], int] = lambda module, seen: 1


def _exact(module: nn.Module, seen: Seen) -> Tensor:
    return torch.ones(())


def _layer_norm(module: LayerNormPre, seen: Seen) -> Tensor:
    x = seen["input"]
    sigma = (x.var(dim=-1, keepdim=True, correction=0) + module.eps).sqrt()
    return (x.abs() + x.abs().mean(dim=-1, keepdim=True)) / sigma


def _layer_norm_scale(module: LayerNormPre, seen: Seen) -> Tensor:
    # δσ = Σ c δc / (n σ) with δc as above, c the centred x; then the root's own rounding.
    x = seen["input"]
    centered = (x - x.mean(dim=-1, keepdim=True)).abs()
    sigma = (centered.square().mean(dim=-1, keepdim=True) + module.eps).sqrt()
    return (centered * _layer_norm(module, seen)).mean(dim=-1, keepdim=True) + sigma


def _layer_norm_output(module: LayerNorm, seen: Seen) -> Tensor:
    return _layer_norm(module, seen) * module.w.abs() + module.b.abs()


def _projection(source: str, letter: str) -> Callable[[Attention, Seen], Tensor]:
    def scale(module: Attention, seen: Seen) -> Tensor:
        W, b = getattr(module, f"W_{letter}"), getattr(module, f"b_{letter}")
        return project(seen.get(source, seen["input"]).abs(), W.abs(), b.abs())

    return scale


def _scores(module: Attention, seen: Seen) -> Tensor:
    q, k = seen["hook_q"].abs(), seen["hook_k"].abs()
    pairs = "batch query head d_head, batch key head d_head -> batch head query key"
    return einsum(q, k, pairs) / math.sqrt(q.shape[-1])


def _pattern(module: Attention, seen: Seen) -> Tensor:
    scores = seen["hook_attn_scores"]
    below_highest = (scores - scores.amax(dim=-1, keepdim=True)).abs()
    return torch.where(scores.isinf(), 0.0, scores.softmax(dim=-1) * (1 + below_highest))


def _average(pattern: Tensor, seen: Seen) -> Tensor:
    values = "batch head query key, batch key head d_head -> batch query head d_head"
    return einsum(pattern, seen["hook_v"].abs(), values)


def _z(module: Attention, seen: Seen) -> Tensor:
    if "hook_pattern" in seen:
        return _average(seen["hook_pattern"], seen)
    # Fused: an error u S in the scores changes p_j by p_j (S_j + Σ p S) u, to first order.
    size = _scores(module, seen)
    q, k = seen["hook_q"], seen["hook_k"]
    pairs = "batch query head d_head, batch key head d_head -> batch head query key"
    scores = einsum(q, k, pairs) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(
        diagonal=scores.shape[-1] - scores.shape[-2] + 1
    )
    pattern = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    spread = 1 + size + (pattern * size).sum(dim=-1, keepdim=True)
    return _average(pattern * spread, seen)


def _result(module: Attention, seen: Seen) -> Tensor:
    pairs = "batch pos head d_head, head d_head d_model -> batch pos head d_model"
    return einsum(seen["hook_z"].abs(), module.W_O.abs(), pairs)


def _attn_out(module: Attention, seen: Seen) -> Tensor:
    per_head = seen["hook_result"].abs() if "hook_result" in seen else _result(module, seen)
    return reduce(per_head, "batch pos head d_model -> batch pos d_model", "sum") + module.b_O.abs()


def _gelu(module: MLP, seen: Seen) -> Tensor:
    x = seen["hook_pre"]
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))
    return 0.5 * x.abs() * (1 + inner.tanh().abs())


def _sum(*names: str) -> Callable[[TransformerBlock, Seen], Tensor]:
    return lambda module, seen: sum((seen[name].abs() for name in names), torch.zeros(()))


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
    "hook_out": Rule(
        LINEAR,
        lambda module, seen: seen["hook_in"].abs() @ module.W_U.abs() + module.b_U.abs(),
        _rows_of_weight("W_U"),
    ),
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
        "hook_z": Rule(ATTEND, _z, _keys),
        "hook_result": Rule(LINEAR, _result, _rows_of_weight("W_O")),
        "output": Rule(LINEAR, _attn_out, lambda module, seen: math.prod(module.W_O.shape[:2])),
    },
    MLP: {
        "hook_pre": Rule(
            LINEAR,
            lambda module, seen: seen["input"].abs() @ module.W_in.abs() + module.b_in.abs(),
            _rows_of_weight("W_in"),
        ),
        "hook_post": Rule(GELU, _gelu),
        "output": Rule(
            LINEAR,
            lambda module, seen: seen["hook_post"].abs() @ module.W_out.abs() + module.b_out.abs(),
            _rows_of_weight("W_out"),
        ),
    },
    TransformerBlock: {
        # The first block's is the rounded sum of token and position embedding.
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
}
# DemoTransformer's own points pass on what its modules gave.
PASSED_ON = Rule(COPY, _exact)
