"""The steps of a check, and the kinds of work in it, with the time that each took."""

import pytest
import torch

from benchmarks import doctor
from clean_transformer.parity import inputs
from clean_transformer.parity.uses.judge import rms

from ..parity.small import small_weights


@pytest.mark.slow
@pytest.mark.usefixtures("model_alone")
def test_every_step_has_its_time(monkeypatch: pytest.MonkeyPatch):
    weights = small_weights(n_layers=1, d_vocab=100, n_ctx=16)
    monkeypatch.setattr(inputs, "choose_weights", lambda source: weights)
    times = doctor.step_times("any")
    steps = [step for step, _, _ in times]
    assert steps[:2] == ["making the weights", "first call"]
    assert steps[-1] == "single operations"
    assert {"end to end", "isolated, blocks.0", "training", "sampling", "invariants"} <= {*steps}
    assert all(wall > 0 for _, wall, _ in times)


def test_the_stopwatch_counts_the_time_of_a_function_inside_another_one_only_once(
    monkeypatch: pytest.MonkeyPatch,
):
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(doctor.time, "process_time", lambda: next(now))
    stopwatch = doctor.Stopwatch()
    stopwatch.kinds = {rms.__code__: "judging"}
    with stopwatch:  # begins at 0
        rms(torch.ones(3))  # from 1 to 3
    assert stopwatch.spent == {"other": 1.0 + 4.0, "judging": 2.0}
