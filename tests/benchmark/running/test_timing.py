"""Spreads, and how often something is called to be timed."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clean_transformer.benchmark.running import timing as _timing
from clean_transformer.benchmark.running.timing import Spread, median_seconds, synchronize


@given(st.lists(st.floats(1e-6, 1e6), min_size=1))
def test_the_spread_is_around_the_median(values: list[float]):
    spread = Spread.of(values)
    assert spread.median == statistics.median(values)
    assert min(values) <= spread.low <= spread.median <= spread.high <= max(values)


def test_quartiles():
    assert Spread.of([1, 2, 3, 4, 5]) == Spread(3, 2, 4)
    assert Spread.of([9, 1]) == Spread(5, 1, 9)


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

    monkeypatch.setattr(_timing.time, "perf_counter", clock)
    assert median_seconds(call, "cpu", at_least=0.19) == pytest.approx(each)
    assert len(calls) == times


def test_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    waited = []
    monkeypatch.setattr("torch.cuda.synchronize", waited.append)
    synchronize("cuda:1")
    synchronize("cpu")
    assert waited == ["cuda:1"]
