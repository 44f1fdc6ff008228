"""Modules as black boxes, and compiled ones."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clean_transformer.parity.activations.black_box import (
    isolate_black_boxes,
    judge_black_box,
    leaves,
)
from clean_transformer.parity.inputs import suite_tokens
from clean_transformer.parity.oracle import float64_oracle
from clean_transformer.parity.verdict import Verdict

from ..small import BF16, F16, F32, F64, corrupted, small_model, small_weights

WEIGHTS = small_weights(d_vocab=300)


def test_leaves_are_all_that_does_arithmetic() -> None:
    parts = [*(f"blocks.{n}.{part}" for n in (0, 1) for part in ("ln1", "attn", "ln2", "mlp"))]
    assert [*leaves(small_model(WEIGHTS))] == ["embed", "pos_embed", *parts, "ln_final", "unembed"]


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
def test_a_healthy_cpu_passes(dtype: torch.dtype) -> None:
    model = small_model(WEIGHTS, dtype)
    rows = isolate_black_boxes(
        model, float64_oracle(model), suite_tokens(model.cfg, 2, 9), case="here"
    )
    assert [row.name for row in rows] == [*leaves(model)]
    assert all(row.ratio <= row.healthy / 2 for row in rows)
    assert {row.verdict for row in rows} == {Verdict.PASS}


@pytest.mark.parametrize("name", ["embed", "blocks.0.attn", "blocks.1.mlp", "unembed"])
def test_a_fault_shows_in_its_own_module(name: str) -> None:
    model = small_model(WEIGHTS)
    oracle = float64_oracle(model)
    with corrupted(model, name, lambda output: output * 1.1):
        rows = isolate_black_boxes(model, oracle, suite_tokens(model.cfg, 2, 9), case="")
    [row] = [row for row in rows if row.verdict is not Verdict.PASS]
    assert (row.name, row.verdict) == (name, Verdict.WRONG)


@pytest.mark.parametrize(
    ("roundings", "verdict"), [(0, Verdict.PASS), (30, Verdict.DEGRADED), (300, Verdict.WRONG)]
)
@torch.no_grad()
def test_the_ratio_is_that_of_the_worst_row(roundings: int, verdict: Verdict) -> None:
    x = torch.rand(3, 64) + 0.5
    output = x.square()
    output[2] *= 1 + roundings * 2**-24
    row = judge_black_box("mine", "", output, torch.square, x)
    assert row.verdict is verdict
    assert not roundings or row.worst_index == (2,)
    # Squares are rounded once, by at most u times their size.
    assert row.ratio == pytest.approx(roundings, rel=0.3, abs=1)


@torch.no_grad()
def test_a_module_that_is_wrong_in_its_own_dtype_only_does_not_pass_by_its_own_standard() -> None:
    class Off(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1.1 if x.dtype == F32 else 1)

    mine, x = Off(8, 4), torch.randn(3, 8)
    assert judge_black_box("mine", "", mine(x), float64_oracle(mine), x).verdict is Verdict.WRONG


@torch.no_grad()
def test_the_first_tensor_counts_and_an_empty_batch_passes() -> None:
    def several(x):
        return [x * 2], "more"

    for x in (torch.randn(3, 8), torch.randn(0, 8)):
        assert judge_black_box("mine", "", x * 2, several, x).verdict is Verdict.PASS


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_wrong(value: float) -> None:
    linear, x = nn.Linear(8, 4), torch.randn(3, 8)
    output = linear(x).detach()
    output[1, 2] = value
    with torch.no_grad():
        row = judge_black_box("mine", "", output, float64_oracle(linear), x)
    assert (row.verdict, row.ratio, row.worst_index) == (Verdict.WRONG, torch.inf, (1,))
    assert row.bits == -torch.inf


@torch.no_grad()
def test_infinities_that_are_the_same_in_both_are_no_error() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)

    def masked(x: Tensor) -> Tensor:
        return (x * 3).masked_fill(mask, -torch.inf)

    x = torch.randn(4, 4)
    output = masked(x)
    row = judge_black_box("mine", "", output, masked, x)
    assert (row.verdict, row.bits > 20) == (Verdict.PASS, True)
    output[2, 1] *= 1.001
    row = judge_black_box("mine", "", output, masked, x)
    assert (row.verdict, row.worst_index) == (Verdict.WRONG, (2,))
    output[2, 1] = -torch.inf
    assert judge_black_box("mine", "", output, masked, x).ratio == torch.inf


COMPILED = """
import torch
from clean_transformer.config import Config
from clean_transformer.parity import invariants
from clean_transformer.parity.inputs import Weights
from clean_transformer.parity.suite import check_device
from clean_transformer.weights.synthetic import stress

torch.set_num_threads(1)
# What runs as written has not been compiled.
torch._dynamo.config.recompile_limit = 1
torch._dynamo.config.fail_on_recompile_limit_hit = True
invariants.INVARIANTS = ()
cfg = Config(n_layers=1, n_heads=1, d_model=32, d_head=32, d_mlp=32, d_vocab=50, n_ctx=8)
for mode in ("compiled", "optimized-compiled"):
    run = check_device(Weights("", cfg, stress(cfg)), "cpu", torch.float32, mode=mode)
    names = [row.name for row in run.isolated]
    print(run.verdict.value, *{row.path for row in run.isolated}, *names)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_modules() -> None:
    """In a process of its own: the checks of types that tests have cannot be compiled."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    block = " ".join(f"blocks.0.{part}" for part in ("ln1", "attn", "ln2", "mlp"))
    expected = [f"PASS black box {blocks} ln_final" for blocks in (block, "blocks.0")]
    assert (done.stdout.splitlines(), done.returncode) == (expected, 0), done.stderr
