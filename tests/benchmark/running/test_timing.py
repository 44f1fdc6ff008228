"""Spreads, and how often a call is repeated."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clean_transformer.benchmark.running import timing
from clean_transformer.benchmark.running.timing import Spread, median_seconds, synchronize


@given(st.lists(st.floats(1e-6, 1e6), min_size=1))
def test_the_spread_is_around_the_median(values: list[float]):
    spread = Spread.of(values)
    assert spread.median == statistics.median(values)
    assert min(values) <= spread.low <= spread.median <= spread.high <= max(values)


def test_quartiles():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([9.0, 1.0]) == Spread(5.0, 1.0, 9.0)


@pytest.mark.parametrize(("each", "times"), [(0.05, 4), (0.3, 1)])
def test_a_call_is_repeated_until_the_time_is_filled(
    each: float, times: int, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    now = 0.0

    def clock() -> float:
        return now

    def call() -> None:
        nonlocal now
        now += each
        calls.append(now)

    monkeypatch.setattr(timing.time, "perf_counter", clock)
    assert median_seconds(call, "cpu", at_least=0.19) == pytest.approx(each)
    assert len(calls) == times


def test_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    waited = []
    monkeypatch.setattr("torch.cuda.synchronize", waited.append)
    synchronize("cuda:1")
    synchronize("cpu")
    assert waited == ["cuda:1"]
