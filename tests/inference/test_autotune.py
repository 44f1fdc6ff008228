from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from clean_transformer.inference import autotune
from clean_transformer.inference.autotune import Candidate, Choice
from clean_transformer.inference.matmuls import (
    Matmul,
    OneDNN,
    SeparateBias,
    SplitInputs,
    ThroughFloat32,
)


def test_a_choice_goes_by_the_number_of_rows():
    few, many = Matmul(), ThroughFloat32()
    choice = Choice({1: few, 64: many}, transposed=False)

    assert [choice(rows) for rows in (1, 63, 64, 1000)] == [few, few, many, many]


class Clock:
    """A clock that only the kernels move: each has its own seconds for few and for many rows."""

    now = 0.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(autotune, "perf_counter", lambda: self.now)
        self.calls: Counter[tuple[type, int]] = Counter()

    def measure(
        self,
        seconds: dict[type, tuple[float, float]],
        orders: tuple[bool, ...] = (False,),
        gain: float = 1.0,
    ) -> dict[int, autotune.Seconds]:
        def run(candidate: Candidate, x: Tensor) -> int:
            kernel = type(candidate.kernel)
            self.calls[kernel, len(x)] += 1
            taken = seconds[kernel][len(x) >= 64]
            self.now += taken / gain if candidate.transposed else taken
            return 1

        candidates = [
            Candidate(kind(2) if kind is SplitInputs else kind(), order)
            for order in orders
            for kind in seconds
        ]
        return autotune.measure(candidates, run, 4, torch.float32)


def test_the_fastest_kernel_wins_and_one_far_slower_is_not_tried_again(monkeypatch):
    clock = Clock(monkeypatch)
    times = clock.measure({Matmul: (3, 2), SeparateBias: (1, 5), ThroughFloat32: (99, 0)})

    best = autotune.fastest(times, transposed=False)
    assert [type(best(rows)) for rows in autotune.ROWS] == [SeparateBias] * 2 + [Matmul] * 2
    assert [autotune.fastest_seconds(times[rows], False) for rows in autotune.ROWS] == [1, 1, 2, 2]
    assert {rows for kernel, rows in clock.calls if kernel is ThroughFloat32} == {1}


def test_a_kernel_for_few_rows_is_not_tried_at_many(monkeypatch):
    clock = Clock(monkeypatch)
    best = autotune.fastest(clock.measure({Matmul: (3, 2), SplitInputs: (1, 1)}), False)
    assert [type(best(rows)) for rows in autotune.ROWS] == [SplitInputs] * 2 + [Matmul] * 2
    assert {rows for kernel, rows in clock.calls if kernel is SplitInputs} == {1, 8}


def test_a_kernel_that_converts_the_weights_first_is_tried_at_many_rows(monkeypatch):
    times = Clock(monkeypatch).measure({Matmul: (1, 4), ThroughFloat32: (12, 2)})
    best = autotune.fastest(times, transposed=False)
    assert [type(best(rows)) for rows in autotune.ROWS] == [Matmul] * 2 + [ThroughFloat32] * 2


def test_each_kernel_is_timed_until_noise_cannot_decide(monkeypatch):
    clock = Clock(monkeypatch)
    clock.measure({Matmul: (1 / 64, 1), SeparateBias: (1 / 32, 1), ThroughFloat32: (1 / 8, 2)})
    # Each is timed for 0.1 seconds.
    assert clock.calls[Matmul, 1] == 7
    assert clock.calls[SeparateBias, 1] == 4
    assert clock.calls[ThroughFloat32, 1] == 1
    # Kernels that take longer get three runs if they are within 2 × the best.
    assert clock.calls[Matmul, 512] == clock.calls[SeparateBias, 512] == 3
    assert clock.calls[ThroughFloat32, 512] == 1


@pytest.mark.parametrize(("gain", "transposed"), [(1.2, True), (1.01, False), (0.1, False)])
def test_weights_are_copied_only_where_it_pays(monkeypatch, gain: float, transposed: bool):
    times = Clock(monkeypatch).measure({Matmul: (1, 1)}, orders=(False, True), gain=gain)
    monkeypatch.setattr(autotune, "measure", lambda *_: times)
    autotune.fastest_for_blocks.cache_clear()

    assert autotune.fastest_for_blocks(4, 8, 1, torch.float32, 1).transposed is transposed
    autotune.fastest_for_blocks.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_onednn_only_the_others_are_measured(monkeypatch, dtype: torch.dtype):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)

    assert not any(isinstance(kernel, OneDNN) for kernel in autotune.kernels(dtype))


def test_a_build_without_the_private_operation_uses_public_ones(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())

    assert not any(isinstance(kernel, OneDNN) for kernel in autotune.kernels(torch.float32))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float64, torch.bfloat16)),
    ],
)
def test_a_choice_is_made_among_the_kernels_of_the_dtype(dtype: torch.dtype):
    blocks = autotune.fastest_for_blocks(8, 16, 2, dtype, 77)
    unembed = autotune.fastest_for_unembed(8, 11, dtype, 77)

    tried = {type(kernel) for kernel in autotune.kernels(dtype)}
    for choice in (blocks, unembed):
        assert {type(kernel) for kernel in choice.by_rows.values()} <= tried
        assert [*choice.by_rows] == [*autotune.ROWS]
