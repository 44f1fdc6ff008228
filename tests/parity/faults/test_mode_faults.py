"""The uses find every fault of optimized and compiled models, and name its part."""

from contextlib import ExitStack, nullcontext
from fnmatch import fnmatch

import pytest
import torch

from clean_transformer.kv_cache import KVCache, StaticKVCache
from clean_transformer.parity.activations.black_box import compiled_leaves
from clean_transformer.parity.faults.modes import MODE_FAULTS, ModeFault
from clean_transformer.parity.uses.compiled_step import judge_compiled_step
from clean_transformer.parity.uses.judge import Judge, UseResult
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.uses.table import uses
from clean_transformer.parity.verdict import Verdict

from ..small import BF16, F32, small_model, small_weights

# One fault of each mode. Planting all takes longer.
FAST = {"optimized-residual-scaled", "compiled-one-token", "step-position-late"}
SIZES = {"n_layers": 1, "d_model": 32, "d_head": 16, "d_mlp": 64, "d_vocab": 101, "n_ctx": 24}
WEIGHTS = small_weights(**SIZES)


def judged(mode: str, fault: ModeFault | None, dtype: torch.dtype = F32) -> list[UseResult]:
    """Run a small model in the mode, with the fault. Nothing is really compiled."""
    model, exact = small_model(WEIGHTS, dtype), ExactParts(WEIGHTS.cfg, WEIGHTS.state, dtype)
    with ExitStack() as entered, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)
        entered.enter_context(fault.plant() if fault else nullcontext())
        if mode == "optimized-compiled":
            return [judge_compiled_step(model, exact)]
        if mode == "optimized":
            model.optimize()
        else:
            entered.enter_context(compiled_leaves(model))
        cache = KVCache if mode == "optimized" else StaticKVCache
        judge = Judge(model, exact, torch.Generator().manual_seed(0), None, cache)
        return [judge(use, locates=False) for use in uses(WEIGHTS.cfg)]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(f, id=f.name, marks=[] if f.name in FAST else [pytest.mark.slow])
        for f in MODE_FAULTS
    ],
)
def test_a_fault_of_a_mode_is_found(fault: ModeFault) -> None:
    wrong = [use for use in judged(fault.mode, fault) if use.verdict is not Verdict.PASS]
    assert wrong
    first = wrong[0].first_failure
    assert first is not None
    assert first.verdict.is_bad, first
    assert fnmatch(first.name, fault.part)
    if fault.mode == "optimized-compiled":
        assert wrong[0].wrong_from == wrong[0].use.reads[0] + int(first.name[5]) - 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("mode", ["optimized", "compiled", "optimized-compiled"])
def test_a_healthy_model_passes(mode: str, dtype: torch.dtype) -> None:
    for use in judged(mode, None, dtype):
        assert use.verdict is Verdict.PASS, use.first_failure


@pytest.mark.parametrize("n_ctx", [1, 2, 3])
def test_the_compiled_step_of_the_shortest_texts(n_ctx: int) -> None:
    weights = small_weights(**(SIZES | {"n_ctx": n_ctx}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: function)
        exact = ExactParts(weights.cfg, weights.state, F32)
        result = judge_compiled_step(small_model(weights), exact)
    assert len(result.rows) == 3 * (len(result.use.reads) - 1)
    assert result.verdict is (Verdict.PASS if n_ctx > 1 else Verdict.NOT_CHECKED)
