"""Invariants: each holds for a healthy model, and fails where it is violated."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.parity import invariants
from clean_transformer.parity.faults import inject
from clean_transformer.parity.faults.semantic import CACHE_FAULTS
from clean_transformer.parity.inputs import suite_tokens
from clean_transformer.parity.invariants import INVARIANTS, check_invariants, row_difference
from clean_transformer.parity.verdict import Verdict
from clean_transformer.support import devices

from .small import BF16, F32, corrupted, small_model, small_weights

WEIGHTS = small_weights(d_vocab=300, n_ctx=16)
ALLOWED = {F32: 1e-4, BF16: 0.1}


@torch.no_grad()
def failures(model: DemoTransformer, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    here = [check for check in INVARIANTS if check is not invariants.fresh_process]
    monkeypatch.setattr(invariants, "INVARIANTS", here)
    tokens = suite_tokens(model.cfg, 2, 9)
    checks = check_invariants(model, tokens, ALLOWED[model.embed.W_E.dtype], model(tokens))
    assert [check.name for check in checks] == [
        "first call",
        "causality",
        "prefix consistency",
        "batch permutation",
        "batch size",
        "cached decoding",
        "padded batch",
        "second call",
    ]
    return {check.name for check in checks if check.verdict is not Verdict.PASS}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_healthy_model_keeps_them(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(small_model(WEIGHTS, dtype), monkeypatch) == set()


class EveryOtherCall:
    """Spoils every second result."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.5 * (self.calls % 2))


def at_full_length(x: Tensor) -> Tensor:
    return x.roll(1, -1) if x.shape[1] == 16 else x


def of_a_single_position(x: Tensor) -> Tensor:
    return 2 * x if x.shape[1] == 1 else x


def in_the_second_entry(x: Tensor) -> Tensor:
    return torch.cat([x[:1], 2 * x[1:]])


def in_a_batch(x: Tensor) -> Tensor:
    return 2 * x if len(x) > 1 else x


@pytest.mark.parametrize(
    ("spoil", "broken"),
    [
        (EveryOtherCall, {"first call", "second call"}),
        (lambda: at_full_length, {"prefix consistency"}),
        (lambda: of_a_single_position, {"cached decoding"}),
        (lambda: in_the_second_entry, {"batch permutation", "batch size"}),
        (lambda: in_a_batch, {"batch size"}),
        (lambda: lambda x: x + x.mean(1, keepdim=True), {"causality", "prefix consistency"}),
    ],
    ids=["second call", "length", "single position", "batch place", "batch size", "causality"],
)
def test_a_violation_is_caught(
    spoil: Callable[[], Callable[[Tensor], Tensor]],
    broken: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model(WEIGHTS)
    with corrupted(model, "blocks.1.hook_resid_pre", spoil()):
        assert broken <= failures(model, monkeypatch)


@pytest.mark.parametrize("fault", CACHE_FAULTS, ids=lambda fault: fault.name)
@torch.no_grad()
def test_a_mistake_in_the_cache_is_caught(fault) -> None:
    """The oracle of the uses has the same cache, so it makes the same mistake."""
    model, tokens = small_model(WEIGHTS), suite_tokens(WEIGHTS.cfg, 2, 9)
    right = model(tokens)
    with inject(fault.name):
        assert torch.equal(model(tokens), right)
        cached, padded = (
            row_difference(*invariant(model, tokens, right)) > ALLOWED[F32]
            for invariant in (invariants.cached_decoding, invariants.padded_batch)
        )
    assert padded
    assert cached is (fault.name == "cached-positions-late")


@pytest.mark.parametrize("n_ctx", [1, 2, 3])
@torch.no_grad()
def test_the_shortest_texts_keep_them(n_ctx: int) -> None:
    model = small_model(small_weights(d_vocab=50, n_ctx=n_ctx))
    tokens = suite_tokens(model.cfg, 2, n_ctx)
    for invariant in (invariants.cached_decoding, invariants.padded_batch):
        one, other = invariant(model, tokens, model(tokens))
        assert one.shape == other.shape
        assert row_difference(one, other) < 1e-5


def test_a_causal_leak_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALLOWED, BF16, 0.02)
    with inject("sdpa-causal-leak"):
        assert "causality" in failures(small_model(WEIGHTS, BF16), monkeypatch)


@torch.no_grad()
def test_a_process_of_its_own_agrees_and_a_device_that_changed_does_not() -> None:
    model, tokens = small_model(WEIGHTS), suite_tokens(WEIGHTS.cfg, 1, 2)
    ours, theirs = invariants.fresh_process(model, tokens, model(tokens))
    assert row_difference(ours, theirs) < 1e-5
    with inject("gelu-tanh-ignored"):
        ours, _ = invariants.small_logits("cpu", "torch.float32"), None
    assert row_difference(ours, theirs) > 1e-5


def test_row_difference_by_hand() -> None:
    other = torch.full((1, 2, 4), 2.0)
    one = other.clone()
    one[0, 1, 0] = 3.0
    assert row_difference(one, other) == pytest.approx(0.25)
    one[0, 0, 0] = torch.nan
    assert row_difference(one, other) == torch.inf


def test_a_new_process_imports_the_same_packages(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device like xla exists only after its package was imported."""
    Path(tmp_path, "adds_a_device.py").write_text(
        f"import os, pathlib; pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(devices, "IMPORTED", imported := [])
    monkeypatch.setattr(invariants, "IMPORTED", imported)
    devices.import_packages(["adds_a_device"])
    model, tokens = small_model(WEIGHTS), suite_tokens(WEIGHTS.cfg, 1, 2)
    invariants.fresh_process(model, tokens, model(tokens))
    assert len([path for path in tmp_path.iterdir() if path.name.isdigit()]) == 2


def test_a_new_process_that_fails_is_one_line(capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariants, "IMPORTED", ["no_such_package"])
    model, tokens = small_model(WEIGHTS), suite_tokens(WEIGHTS.cfg, 1, 2)
    reason = "a new process failed: ValueError: cannot import no_such_package"
    with pytest.raises(RuntimeError, match=reason):
        invariants.fresh_process(model, tokens, model(tokens))
    assert capfd.readouterr() == ("", "")
