"""Isolated errors: each activation is judged by the error that it alone introduces."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.healthy_settings import threads
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.activations.isolated import PATHS, Isolated, isolate
from clean_transformer.parity.activations.oracle_run import HEAD_AXIS
from clean_transformer.parity.faults import inject
from clean_transformer.parity.inputs import suite_tokens
from clean_transformer.parity.oracle import float64_oracle
from clean_transformer.parity.verdict import Verdict

from ..small import BF16, F16, F32, F64, corrupted, small_model, small_weights

WEIGHTS = small_weights(d_vocab=300)
PASS, WRONG = Verdict.PASS, Verdict.WRONG


def rows_of(model: DemoTransformer, length: int = 9, **options: Any) -> list[Isolated]:
    return isolate(model, float64_oracle(model), suite_tokens(model.cfg, 2, length), **options)


def bad(rows: list[Isolated]) -> list[str]:
    return [row.name for row in rows if row.verdict is not PASS]


@settings(max_examples=12)
@given(
    dtype=st.sampled_from([F64, F32, BF16, F16]),
    kind=st.sampled_from(["plain", "stress"]),
    heads=st.integers(1, 3),
    d_head=st.sampled_from([1, 5, 16]),
    d_mlp=st.integers(1, 70),
    length=st.integers(1, 20),
    seed=st.integers(0, 5),
    tied=st.booleans(),
)
def test_healthy_runs_pass(dtype, kind, heads, d_head, d_mlp, length, seed, tied) -> None:
    shape = {"n_heads": heads, "d_head": d_head, "d_model": max(32, heads * d_head)}
    others = {"d_mlp": d_mlp, "d_vocab": 40, "n_ctx": 20, "tied_unembed": tied}
    model = small_model(small_weights(kind, seed, **shape, **others), dtype)
    with threads(1):
        for path in PATHS:
            rows = rows_of(model, length, path=path)
            assert bad(rows) == [], [row for row in rows if row.verdict is not PASS]
            assert len({row.name for row in rows}) == len(rows)


EVERY = [row.name for row in rows_of(small_model(WEIGHTS), 3, path="per head")]


@pytest.mark.parametrize("name", [name for name in EVERY if ".1." not in name and name])
def test_an_error_shows_where_it_is_made_and_nowhere_else(name: str) -> None:
    """What comes after it is computed rightly from what is wrong."""
    model = small_model(WEIGHTS)
    oracle = float64_oracle(model)
    tokens = suite_tokens(model.cfg, 2, 9)
    with corrupted(model, name, lambda output: torch.where(output == 0, 0.5, output * 1.25)):
        rows = isolate(model, oracle, tokens, path="per head")
    # ln1 normalizes the split inputs one after the other, and one of its outputs stands for three.
    also = ["blocks.0.attn.hook_q", "blocks.0.attn.hook_k"] if "_input" in name else []
    assert bad(rows)[0] == name
    assert set(bad(rows)) <= {name, *also}


@pytest.mark.parametrize(
    "name",
    ["hook_q", "hook_k", "hook_v", "hook_z", "hook_attn_scores", "hook_pattern", "hook_result"],
)
def test_the_heads_ratios_point_at_the_corrupted_one(name: str) -> None:
    model = small_model(WEIGHTS)
    oracle = float64_oracle(model)
    axis = HEAD_AXIS[name]

    def spoil(output: Tensor) -> Tensor:
        wrong = output.clone()
        wrong.select(axis, 1).mul_(1.01)
        return wrong

    with corrupted(model, f"blocks.0.attn.{name}", spoil):
        rows = isolate(model, oracle, suite_tokens(model.cfg, 2, 9), path="per head")
    [row] = [row for row in rows if row.verdict is not PASS]
    assert row.per_head[0] <= row.healthy < row.per_head[1] == row.ratio
    assert row.worst_index[axis] == 1


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("name", ["blocks.0.attn.hook_q", "blocks.1.mlp", "unembed.hook_out"])
def test_a_permuted_result_is_wrong(name: str, dtype: torch.dtype) -> None:
    model = small_model(WEIGHTS, dtype)
    oracle = float64_oracle(model)
    with corrupted(model, name, lambda output: output.flip(-1)):
        rows = isolate(model, oracle, suite_tokens(model.cfg, 2, 9))
    [row] = [row for row in rows if row.verdict is not PASS]
    assert (row.name, row.verdict, row.lower_precision) == (name, WRONG, "")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_wrong(value: float) -> None:
    model = small_model(WEIGHTS)
    oracle = float64_oracle(model)
    with corrupted(model, "blocks.1.hook_resid_post", lambda x: torch.full_like(x, value)):
        rows = isolate(model, oracle, suite_tokens(model.cfg, 2, 9))
    first = next(row for row in rows if row.verdict is not PASS)
    assert (first.name, first.verdict, first.ratio) == (
        "blocks.1.hook_resid_post",
        WRONG,
        torch.inf,
    )


@pytest.mark.parametrize(
    ("fault", "precision"), [("matmul-tf32", "TF32"), ("matmul-bf16-inputs", "bfloat16")]
)
def test_a_lower_precision_is_named_and_is_degraded(fault: str, precision: str) -> None:
    model = small_model(WEIGHTS)
    with inject(fault):
        rows = rows_of(model, path="fused")
    slow = [row for row in rows if row.verdict is not PASS]
    assert {row.verdict for row in slow} == {Verdict.DEGRADED}
    assert {row.lower_precision for row in slow} == {precision}
    assert {row.operation for row in slow} == {"linear"}
    bits = {"TF32": (11, 15), "bfloat16": (8, 12)}[precision]
    assert all(bits[0] < row.bits < bits[1] for row in slow)


def test_autocast_is_judged_by_the_precision_it_multiplies_in() -> None:
    model = small_model(WEIGHTS)
    for path in PATHS:
        assert bad(rows_of(model, path=path, autocast=BF16)) == []
    with corrupted(model, "blocks.0.mlp.hook_pre", lambda pre: pre.flip(-1)):
        oracle = float64_oracle(small_model(WEIGHTS))
        tokens = suite_tokens(model.cfg, 2, 9)
        assert bad(isolate(model, oracle, tokens, autocast=BF16)) == ["blocks.0.mlp.hook_pre"]


LAYOUTS = {
    "permuted": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], dim=1)[:, x.shape[1] :],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", PATHS)
def test_layouts(layout: str, path: str) -> None:
    block = small_model(WEIGHTS).blocks[1]
    x = LAYOUTS[layout](torch.randn(2, 9, 128))
    assert not x.is_contiguous() or x.storage_offset()
    rows = isolate(block, float64_oracle(block), x, path=path, case=layout)
    assert bad(rows) == []
    assert {(row.case, row.path) for row in rows} == {(layout, path)}


@pytest.mark.parametrize(
    ("name", "roundings", "verdict"),
    [
        ("blocks.0.ln1", 5, PASS),
        ("blocks.0.ln1", 100, Verdict.DEGRADED),
        ("blocks.0.ln1", 2000, WRONG),
        ("blocks.0.hook_resid_mid", 40, WRONG),
        ("hook_embed", 2, WRONG),
    ],
)
def test_a_few_roundings_pass_many_are_degraded_and_a_copy_is_exact(
    name: str, roundings: int, verdict: Verdict
) -> None:
    model = small_model(WEIGHTS)
    oracle, tokens = float64_oracle(model), suite_tokens(model.cfg, 2, 9)
    with corrupted(model, name, lambda x: x * (1 + roundings * 2**-24)):
        rows = {row.name: row for row in isolate(model, oracle, tokens, path="fused")}
    assert rows[name].verdict is verdict, rows[name]


def test_the_oracle_is_a_copy() -> None:
    model = small_model(WEIGHTS)
    oracle = float64_oracle(model)
    assert {value.dtype for value in oracle.state_dict().values()} == {F64}
    assert {value.dtype for value in model.state_dict().values()} == {F32}
