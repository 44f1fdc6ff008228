"""The bounds: one rule for every activation, and a ratio that is what its definition says."""

import math

import pytest
import torch
from torch import nn

from clean_transformer.config import Config
from clean_transformer.hooks import HookedModule
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.mlp import MLP
from clean_transformer.parity.activations.bounds import (
    ADD,
    ATTEND,
    COPY,
    GELU,
    LAYER_NORM,
    LINEAR,
    RULES,
    SOFTMAX,
)
from clean_transformer.parity.activations.isolated import PATHS, isolate, watched_names
from clean_transformer.parity.activations.oracle_run import owner_of
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, float64_oracle

from ..small import BF16, F16, F32, F64, corrupted, small_weights

U32, U16 = UNIT_ROUNDOFF[F32], UNIT_ROUNDOFF[BF16]


def config(**changes) -> Config:
    return small_weights(d_vocab=50, **changes).cfg


@pytest.mark.parametrize(("tied", "normalization"), [(True, "LN"), (False, "LN"), (False, "LNPre")])
def test_every_activation_has_a_rule(tied: bool, normalization: str) -> None:
    model = DemoTransformer(config(tied_unembed=tied, normalization_type=normalization))
    without = {
        name
        for name in watched_names(model, "per head")
        if owner_of(name)[1] not in RULES.get(type(model.get_submodule(owner_of(name)[0])), {})
    }
    # They hand on what a module has given, and that has a rule.
    assert without == {"", "hook_embed", "hook_pos_embed"}


def test_what_does_arithmetic_is_not_called_a_copy() -> None:
    copies = {
        (module.__name__, name)
        for module, rules in RULES.items()
        for name, rule in rules.items()
        if rule.kind is COPY
    }
    unembed = {
        (kind, name) for kind in ("Unembed", "TiedUnembed") for name in ("hook_in", "output")
    }
    split = ("attn_in", "q_input", "k_input", "v_input", "attn_out", "mlp_in", "mlp_out")
    block = {("TransformerBlock", f"hook_{name}") for name in split}
    embeds = {("Embed", "output"), ("PosEmbed", "output"), ("TransformerBlock", "output")}
    assert copies == unembed | block | embeds


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_the_ratio_of_a_linear_layer_by_hand(dtype: torch.dtype) -> None:
    """|device - exact| / (u G), with G = |x||W| + |b| in float32 and float64."""
    torch.manual_seed(0)
    mlp = MLP(config()).to(dtype)
    nn.init.normal_(mlp.b_in)
    x = torch.randn(2, 3, 128).to(dtype)
    u = UNIT_ROUNDOFF[dtype]
    off = torch.zeros(256, dtype=dtype)
    off[7] = 0.5
    oracle = float64_oracle(mlp)
    with corrupted(mlp, "hook_pre", lambda pre: pre + off):
        rows = {row.name: row for row in isolate(mlp, oracle, x)}
        _, cache = mlp.run_with_cache(x)
    W, b, given = mlp.W_in.detach().double(), mlp.b_in.detach().double(), x.double()
    exact = given @ W + b
    G = given.abs() @ W.abs() + b.abs()
    if u > U32:
        squares = (given.square() @ W.square() + b.square()).sqrt()
        G = exact.abs() + squares + U32 / u * G
    ratios = (cache["hook_pre"].double() - exact).abs() / (u * G + smallest(dtype))
    row = rows["hook_pre"]
    assert row.ratio == pytest.approx(float(ratios.max()), rel=1e-6)
    assert row.rms_ratio == pytest.approx(float(ratios.square().mean().sqrt()), rel=1e-6)
    assert row.bits == pytest.approx(-math.log2(row.rms_ratio * u))
    assert row.worst_index[-1] == 7


def smallest(dtype: torch.dtype) -> float:
    return 2.0**-24 if dtype is F16 else torch.finfo(dtype).tiny


@pytest.mark.parametrize(
    ("kind", "summed", "u", "limits"),
    [
        (COPY, 1, U32, (0, 0)),
        (ADD, 1, U32, (1, 2)),
        (LAYER_NORM, 768, U32, (30, 300)),
        (GELU, 1, U16, (16, 160)),
        (LINEAR, 9, U32, (30, 30)),
        (LINEAR, 768, U32, (30, 768)),
        (LINEAR, 768, U16, (8, 30)),
        (SOFTMAX, 1024, U32, (256, 1024)),
        (ATTEND, 1024, U32, (256, 1024)),
        (ATTEND, 1024, U16, (30, 30)),
    ],
)
def test_limits(kind, summed: int, u: float, limits: tuple[float, float]) -> None:
    assert kind.limits(summed, u) == limits


def test_every_path_watches_its_activations() -> None:
    model: HookedModule = DemoTransformer(config())
    fused, explicit, everything = (set(watched_names(model, path)) for path in PATHS)
    assert fused < explicit < everything
    assert everything == {""} | set(model.hook_dict) | fused
    assert "blocks.0.attn.hook_pattern" in explicit - fused
    assert "blocks.0.attn.hook_result" in everything - explicit
