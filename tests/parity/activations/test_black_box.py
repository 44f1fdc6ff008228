"""Modules as black boxes, and compiled ones."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

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
def test_the_cpu_is_as_good_as_itself(dtype: torch.dtype) -> None:
    model = small_model(WEIGHTS, dtype)
    rows = isolate_black_boxes(
        model, model, float64_oracle(model), suite_tokens(model.cfg, 2, 9), case="here"
    )
    assert [row.name for row in rows] == [*leaves(model)]
    assert all(row.ratio <= 1 for row in rows)
    assert {row.verdict for row in rows} == {Verdict.PASS}


@pytest.mark.parametrize("name", ["embed", "blocks.0.attn", "blocks.1.mlp", "unembed"])
def test_a_fault_shows_in_its_own_module(name: str) -> None:
    model = small_model(WEIGHTS)
    on_cpu, oracle = small_model(WEIGHTS), float64_oracle(model)
    with corrupted(model, name, lambda output: output * 1.1):
        rows = isolate_black_boxes(model, on_cpu, oracle, suite_tokens(model.cfg, 2, 9), case="")
    [row] = [row for row in rows if row.verdict is not Verdict.PASS]
    assert (row.name, row.verdict) == (name, Verdict.WRONG)


@pytest.mark.parametrize(
    ("envelopes", "verdict"), [(0, Verdict.PASS), (10, Verdict.DEGRADED), (100, Verdict.WRONG)]
)
@torch.no_grad()
def test_the_ratio_is_that_of_the_worst_row(envelopes: int, verdict: Verdict) -> None:
    linear = nn.Linear(8, 4)
    oracle, x = float64_oracle(linear), torch.randn(3, 8)
    right, exact = linear(x), oracle(x.double())
    error = (right.double() - exact).abs().maximum(2**-24 * exact.abs()).square().mean(-1).sqrt()
    wrong = right.double()
    wrong[2] += envelopes * error.max()
    by_row = (wrong.float().double() - exact).square().mean(-1).sqrt()
    row = judge_black_box("mine", "", wrong.float(), linear, oracle, x)
    assert row.ratio == pytest.approx(float(by_row.max() / error.max()))
    assert row.worst_index == (int(by_row.argmax()),)
    assert row.verdict is verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ulps", "verdict"), [(1, Verdict.PASS), (4, Verdict.DEGRADED)])
def test_a_lucky_cpu_asks_for_no_more_than_rounding(dtype, ulps: int, verdict: Verdict) -> None:
    x = torch.full((2, 3), 2048.0, dtype=dtype)
    output = x * (1 + ulps * torch.finfo(dtype).eps)
    row = judge_black_box("mine", "", output, lambda x: x, lambda x: x, x)
    assert row.verdict is verdict
    assert row.ratio == 2 * ulps


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_wrong(value: float) -> None:
    linear, x = nn.Linear(8, 4), torch.randn(3, 8)
    output = linear(x).detach()
    output[1, 2] = value
    with torch.no_grad():
        row = judge_black_box("mine", "", output, linear, float64_oracle(linear), x)
    assert (row.verdict, row.ratio, row.worst_index) == (Verdict.WRONG, torch.inf, (1,))


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
    expected = [
        f"PASS black box embed pos_embed {blocks} ln_final unembed"
        for blocks in (block, "blocks.0")
    ]
    assert (done.stdout.splitlines(), done.returncode) == (expected, 0), done.stderr
