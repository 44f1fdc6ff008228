"""NaN and infinity are WRONG wherever they are, and faults of the weights are not the device's."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clean_transformer.analysis.comparison import rms_difference
from clean_transformer.parity import suite
from clean_transformer.parity.activations.black_box import judge_black_box
from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.inputs import Weights, suite_tokens
from clean_transformer.parity.invariants import row_difference
from clean_transformer.parity.limits import LINEAR, error_ratios
from clean_transformer.parity.operations.judgment import judge
from clean_transformer.parity.operations.replay import Expected
from clean_transformer.parity.report.json import to_json
from clean_transformer.parity.same_function import compare_tensors
from clean_transformer.parity.suite import check_device
from clean_transformer.parity.uses.judge import elementwise
from clean_transformer.parity.uses.overflow import overflowing_activation
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.uses.table import Use
from clean_transformer.parity.verdict import SAME_FUNCTION, Verdict
from clean_transformer.weights.refusals import WeightsError

from .small import BF16, F16, F32, F64, small_weights

WEIGHTS = small_weights(n_layers=1, d_vocab=100, n_ctx=16)
SHAPE = (2, 3, 4)
USE = Use("forward", "reading", 2, (3,), is_cached=False)
places = st.sets(st.integers(0, math.prod(SHAPE) - 1), min_size=1, max_size=5)
# (what the device has, what the exact result has)
values = st.sampled_from(
    [
        (math.nan, 1.0),
        (math.nan, math.nan),
        (math.nan, math.inf),
        (1.0, math.nan),
        (math.inf, 1.0),
        (-math.inf, 1.0),
        (math.inf, -math.inf),
        (1.0, math.inf),
        (1.0, -math.inf),
    ]
)
DTYPES = st.sampled_from([F64, F32, BF16, F16])


def spoiled(where: set[int], pair: tuple[float, float], dtype: torch.dtype) -> list[Tensor]:
    """A tensor of the device and its exact value, which are equal except at some places."""
    exact = torch.linspace(-1, 1, math.prod(SHAPE)).to(dtype).double()
    device = exact.clone()
    device[[*where]], exact[[*where]] = pair
    return [device.reshape(SHAPE).to(dtype), exact.reshape(SHAPE)]


@given(places, values, DTYPES)
def test_it_is_wrong_everywhere(
    where: set[int], pair: tuple[float, float], dtype: torch.dtype
) -> None:
    got, exact = spoiled(where, pair, dtype)
    for row in (
        compare_tensors("x", "x", got, exact, SAME_FUNCTION),
        elementwise("x", USE, got, exact, exact.abs(), LINEAR, 4)[0],
        judge_black_box("x", "", got, lambda x: exact, got),
    ):
        assert row.verdict is Verdict.WRONG, row
    if not (math.isnan(pair[0]) and math.isnan(pair[1])):  # an operation may return NaN for NaN
        expected = Expected(exact, exact.abs(), healthy=30.0, wrong=100.0)
        assert judge([expected], got).verdict is Verdict.WRONG
    assert float(error_ratios((got.double() - exact).abs(), exact.abs(), 1e-8, dtype).max()) > 1e9
    assert row_difference(got, exact) == math.inf
    drift = EndToEnd("x", rms_difference(got, exact), 1.0, 2.0)
    assert (drift.verdict, drift.rho) == (Verdict.WRONG, math.inf)


def with_weight(name: str, value: float) -> Weights:
    state = {key: weight.clone() for key, weight in WEIGHTS.state.items()}
    state[name].view(-1)[5] = value
    return replace(WEIGHTS, state=state)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["embed.W_E", "blocks.0.ln1.b", "blocks.0.mlp.W_out"])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    message = f"small stress weights cannot be checked: {name} has 1 of "
    with pytest.raises(WeightsError, match=message):
        with_weight(name, value)


def test_a_weight_that_float16_cannot_hold_is_not_the_device_s() -> None:
    weights = with_weight("blocks.0.mlp.W_in", -70_000.0)
    run = check_device(weights, "cpu", F16)
    assert run.verdict is Verdict.NOT_CHECKED
    assert run.not_checked == (
        "this model does not fit into float16: the weight blocks.0.mlp.W_in reaches 70000, and the "
        "largest number in float16 is 65504"
    )


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("blocks.0.attn.W_Q", "blocks.0.attn.hook_q"),
        ("blocks.0.mlp.W_in", "blocks.0.mlp.hook_pre"),
        ("ln_final.w", "ln_final"),
        ("embed.W_E", "logits"),
    ],
)
def test_an_activation_that_float16_cannot_hold(parameter: str, named: str) -> None:
    weight = WEIGHTS.state[parameter]
    state = WEIGHTS.state | {parameter: weight.sign() * 6e4}
    tokens = suite_tokens(WEIGHTS.cfg)
    said = overflowing_activation(ExactParts(WEIGHTS.cfg, state, F16), tokens)
    assert f"this model does not fit into float16: the activation {named} reaches " in said
    assert overflowing_activation(ExactParts(WEIGHTS.cfg, state, F32), tokens) == ""
    assert overflowing_activation(ExactParts(WEIGHTS.cfg, WEIGHTS.state, F16), tokens) == ""


def test_an_activation_that_overflows_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(suite, "_start", lambda *args: pytest.fail("too late"))
    state = WEIGHTS.state | {"ln_final.w": torch.full_like(WEIGHTS.state["ln_final.w"], 6e4)}
    run = check_device(replace(WEIGHTS, state=state), "cpu", F16)
    assert "the activation ln_final reaches" in run.not_checked
    assert to_json(run)["verdict"] == "NOT CHECKED"
