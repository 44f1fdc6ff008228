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
from clean_transformer.parity.oracle import ACCUMULATOR

# A module's activations in float64, as the device gave them: "input" (and "input 1", …), and its
# hook points by name.
Seen = Mapping[str, Tensor]


# What is taken of every factor of a sum of products: its size, or its square.
Size = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of operation, and the largest ratio that a healthy device has and any device may have.

    `wrong` is None where the second is the summed length k, from γ_k = k u / (1 - k u). Sums of
    terms of one sign, such as an average, gather errors like √k: `healthy_per_root` is λ in the
    probabilistic bound λ √k u, which one rounding exceeds with probability 2 exp(-λ²/2) (Higham
    and Mary 2019, theorem 2.4): at λ = 8, 3e-14, less than one in all the sums of a run. In half
    precision, where sums are kept in float32, their length does not matter: a product is rounded
    a few times, and beyond `healthy_in_half` its running total was in half precision too.
    """

    name: str
    healthy: float
    wrong: float | None
    healthy_per_root: float = 0.0
    healthy_in_half: float | None = None

    def limits(self, summed: int, u: float) -> tuple[float, float]:
        """The largest ratio that passes, and the one above which no order of rounding explains
        the error, for a sum of that many terms. The two are one where G is not Σ|xW|."""
        if u > ACCUMULATOR:
            return self.healthy_in_half or self.healthy, self.wrong or self.healthy
        healthy = max(self.healthy, self.healthy_per_root * math.sqrt(summed))
        return healthy, max(healthy, float(summed)) if self.wrong is None else self.wrong


COPY = Kind("gather, copy, mask", 0.0, 0.0)


ADD = Kind("residual add", 1.0, 2.0)


LINEAR = Kind("linear", 30.0, None, healthy_in_half=8.0)


SOFTMAX = Kind("softmax", 30.0, None, healthy_per_root=8.0)


LAYER_NORM = Kind("layer norm", 30.0, 300.0)


GELU = Kind("gelu_new", 16.0, 160.0)


ATTEND = Kind("attention", 30.0, None, healthy_per_root=8.0)


@dataclass(frozen=True)
class Rule:
    """The kind of operation that makes an activation, and how many terms it sums.

    `terms(module, seen, size)` adds up the sizes of what is summed: with `abs` it is G. With
    `square`, for sums of products, its root is what independent roundings of them add up to.
    """

    kind: Kind
    terms: Callable[[Any, Seen, Size], Tensor]
    summed: Callable[[Any, Seen], int] = lambda module, seen: 1

    def scale(self, module: nn.Module, seen: Seen, exact: Tensor, u: float) -> Tensor:
        """G, for an activation computed with that unit roundoff.

        In half precision the products are exact and summed in float32, so that only the result is
        rounded to it: G is then far below Σ|xW|, which a sum of thousands of terms that is plain
        wrong would not exceed.
        """
        if self.kind not in (LINEAR, ATTEND) or u <= ACCUMULATOR:
            return self.terms(module, seen, torch.abs)
        return (
            exact.abs().nan_to_num(posinf=0.0)
            + self.terms(module, seen, torch.square).sqrt()
            + ACCUMULATOR / u * self.terms(module, seen, torch.abs)
        )


def _exact(module: nn.Module, seen: Seen, size: Size) -> Tensor:
    return torch.ones(())


def _layer_norm(module: LayerNormPre, seen: Seen, size: Size) -> Tensor:
    x = seen["input"]
    sigma = (x.var(dim=-1, keepdim=True, correction=0) + module.eps).sqrt()
    return (x.abs() + x.abs().mean(dim=-1, keepdim=True)) / sigma


def _layer_norm_scale(module: LayerNormPre, seen: Seen, size: Size) -> Tensor:
    # δσ = Σ c δc / (n σ) with δc as above, c the centered x; then the root's own rounding.
    x = seen["input"]
    centered = (x - x.mean(dim=-1, keepdim=True)).abs()
    sigma = (centered.square().mean(dim=-1, keepdim=True) + module.eps).sqrt()
    return (centered * _layer_norm(module, seen, size)).mean(dim=-1, keepdim=True) + sigma


def _layer_norm_output(module: LayerNorm, seen: Seen, size: Size) -> Tensor:
    return _layer_norm(module, seen, size) * module.w.abs() + module.b.abs()


def _projection(source: str, letter: str) -> Callable[[Attention, Seen, Size], Tensor]:
    def terms(module: Attention, seen: Seen, size: Size) -> Tensor:
        W, b = getattr(module, f"W_{letter}"), getattr(module, f"b_{letter}")
        return project(size(seen.get(source, seen["input"])), size(W), size(b))

    return terms


def _scores(module: Attention, seen: Seen, size: Size) -> Tensor:
    pairs = "batch query head d_head, batch key head d_head -> batch head query key"
    q = seen["hook_q"] / math.sqrt(seen["hook_q"].shape[-1])
    return einsum(size(q), size(seen["hook_k"]), pairs)


def _pattern(module: Attention, seen: Seen, size: Size) -> Tensor:
    scores = seen["hook_attn_scores"]
    below_highest = (scores - scores.amax(dim=-1, keepdim=True)).abs()
    return torch.where(scores.isinf(), 0.0, scores.softmax(dim=-1) * (1 + below_highest))


def _z(module: Attention, seen: Seen, size: Size) -> Tensor:
    values = "batch head query key, batch key head d_head -> batch query head d_head"
    if "hook_pattern" in seen:
        return einsum(size(seen["hook_pattern"]), size(seen["hook_v"]), values)
    scores = _scores(module, seen, lambda factor: factor)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(
        diagonal=scores.shape[-1] - scores.shape[-2] + 1
    )
    pattern = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    if size is torch.square:
        return einsum(pattern.square(), seen["hook_v"].square(), values)
    # Fused: an error u S in the scores changes p_j by p_j (S_j + Σ p S) u, to first order.
    gathered = _scores(module, seen, torch.abs)
    spread = 1 + gathered + (pattern * gathered).sum(dim=-1, keepdim=True)
    return einsum(pattern * spread, seen["hook_v"].abs(), values)


def _result(module: Attention, seen: Seen, size: Size) -> Tensor:
    pairs = "batch pos head d_head, head d_head d_model -> batch pos head d_model"
    return einsum(size(seen["hook_z"]), size(module.W_O), pairs)


def _attn_out(module: Attention, seen: Seen, size: Size) -> Tensor:
    watched = "hook_result" in seen
    per_head = size(seen["hook_result"]) if watched else _result(module, seen, size)
    return reduce(per_head, "batch pos head d_model -> batch pos d_model", "sum") + size(module.b_O)


def _matrix(source: str, W: str, b: str) -> Callable[[Any, Seen, Size], Tensor]:
    def terms(module: Any, seen: Seen, size: Size) -> Tensor:
        return size(seen[source]) @ size(getattr(module, W)) + size(getattr(module, b))

    return terms


def _gelu(module: MLP, seen: Seen, size: Size) -> Tensor:
    x = seen["hook_pre"]
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))
    return 0.5 * x.abs() * (1 + inner.tanh().abs())


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
        "hook_z": Rule(ATTEND, _z, _keys),
        "hook_result": Rule(LINEAR, _result, _rows_of_weight("W_O")),
        "output": Rule(LINEAR, _attn_out, lambda module, seen: math.prod(module.W_O.shape[:2])),
    },
    MLP: {
        "hook_pre": Rule(LINEAR, _matrix("input", "W_in", "b_in"), _rows_of_weight("W_in")),
        "hook_post": Rule(GELU, _gelu),
        "output": Rule(LINEAR, _matrix("hook_post", "W_out", "b_out"), _rows_of_weight("W_out")),
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
