"""The steps of a check, with the time that each took."""

import pytest

from benchmarks import doctor
from clean_transformer.parity import inputs

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
