"""The uses find every fault of optimized and compiled models, and name its part."""

import pytest
import torch

from benchmarks.planted_faults import find_mode_fault, judge_of, seldom_found, small_weights
from clean_transformer.parity.faults.modes import MODE_FAULTS, ModeFault
from clean_transformer.parity.uses.compiled_step import judge_compiled_step
from clean_transformer.parity.verdict import Verdict

from ..small import BF16, F32

# One fault of each mode. Planting all takes longer.
FAST = {"optimized-residual-scaled", "compiled-one-token", "step-position-late"}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(f, id=f.name, marks=[] if f.name in FAST else [pytest.mark.slow])
        for f in MODE_FAULTS
    ],
)
def test_a_fault_of_a_mode_is_found(fault: ModeFault) -> None:
    assert find_mode_fault(fault, fault.mode) == (True, True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["optimized", "compiled", "optimized-compiled"])
def test_a_healthy_model_has_none(mode: str) -> None:
    assert find_mode_fault(None, mode) == (False, False)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("n_ctx", [1, 2, 3])
def test_the_compiled_step_of_the_shortest_texts(
    n_ctx: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    judge = judge_of(small_weights(d_model=32, d_mlp=64, d_vocab=101, n_ctx=n_ctx), dtype)
    result = judge_compiled_step(judge.model, judge.exact)
    assert len(result.rows) == 3 * (len(result.use.reads) - 1)
    assert result.verdict is (Verdict.PASS if n_ctx > 1 else Verdict.NOT_CHECKED)


def test_the_wrong_position_of_a_step_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    (fault,) = (fault for fault in MODE_FAULTS if fault.name == "step-first-logits-again")
    judge = judge_of(small_weights(d_model=32, d_mlp=64, d_vocab=101, n_ctx=24), F32)
    with fault.plant():
        result = judge_compiled_step(judge.model, judge.exact)
    assert result.wrong_from == result.use.reads[0] + 1


def test_a_fault_that_strikes_seldom_is_found_whenever_it_strikes() -> None:
    figures = seldom_found(1 / 30, 12)
    assert 0 < figures["struck"] == figures["found"] < 12
