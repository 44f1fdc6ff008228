"""Operations and bytes are counted correctly, and the limit is computed from them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from clean_transformer.benchmark.contestants import limit as limit_module
from clean_transformer.benchmark.contestants.limit import (
    Limit,
    Shape,
    attention_flops,
    cache_bytes,
    fastest,
    flops,
    weight_bytes,
)
from clean_transformer.benchmark.running.models import TINY, config, count_parameters
from clean_transformer.benchmark.work import Work
from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.weights.formats.huggingface import write_folder
from clean_transformer.weights.synthetic import plain

CFG = Config(n_layers=2, n_heads=2, d_model=16, d_head=8, d_mlp=64, d_vocab=50, n_ctx=32)
SMALL = config("small")


@given(st.integers(1, 3), st.integers(1, 32), st.booleans())
def test_the_products_are_those_of_the_model(batch: int, length: int, last_only: bool):
    """PyTorch counts them, too, but not those of the fused attention on a CPU."""
    model, tokens = DemoTransformer(CFG), torch.zeros(batch, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, last_only=last_only)
    work = Work(kind="forward", batch=batch, length=length, last_only=last_only)
    attention = attention_flops(CFG, batch, length)
    assert flops(CFG, work) - attention == counter.get_total_flops()
    pairs = sum(query + 1 for query in range(length))  # that the mask allows
    assert attention == batch * CFG.n_layers * CFG.n_heads * pairs * 2 * (2 * CFG.d_head)


def test_a_step_is_one_more_token():
    step = Work(kind="step", length=9, new=4)
    rest = flops(CFG, Work(kind="forward", length=10, last_only=True))
    rest -= flops(CFG, Work(kind="forward", length=9, last_only=True))
    unembed = Shape(1, CFG.d_model, CFG.d_vocab).flops  # which the shorter pass also computed
    assert flops(CFG, step) == rest + unembed


def test_the_bytes_of_gpt2():
    assert count_parameters(SMALL) == 124_439_808 + 50_257  # and b_U
    vectors = 12 * (4 * 768 + 2 * 768 + 3072 + 3 * 768 + 768) + 2 * 768
    matrices = count_parameters(SMALL) - 50_257 - 1024 * 768
    assert matrices - vectors <= weight_bytes(SMALL, "float32") / 4 <= matrices
    assert weight_bytes(SMALL, "float32") == 2 * weight_bytes(SMALL, "bfloat16")
    assert weight_bytes(SMALL, "float32") == 4 * weight_bytes(SMALL, "int8")
    assert cache_bytes(SMALL, 1000, "bfloat16") == 2 * 12 * 768 * 1000 * 2


def made_up(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Limit:
    """A machine of 1 TFLOP/s and 1 GB/s."""
    write_folder(folder, TINY, plain(TINY))
    monkeypatch.setattr(limit_module, "BUFFER", 2**14)
    limit = Limit(folder, "cpu", "float32")
    monkeypatch.setattr(limit, "product", lambda shape, at_least: shape.flops / 1e12)
    monkeypatch.setattr(limit_module, "median_seconds", lambda *_, **__: 2**14 / 1e9)
    return limit


def test_the_limit_of_each_kind_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    limit = made_up(monkeypatch, tmp_path)
    reading = weight_bytes(TINY, "float32") / 1e9
    work = Work(kind="forward", batch=64, length=1024)
    assert limit.measure(work, 0.0) == pytest.approx(flops(TINY, work) / 1e12)
    train = Work(kind="train", batch=64, length=1024)
    assert limit.measure(train, 0.0) == pytest.approx(3 * limit.measure(work, 0.0))
    assert limit.measure(Work(kind="forward"), 0.0) == pytest.approx(reading)
    generated = limit.measure(Work(kind="generate", length=16, new=4), 0.0)
    assert generated == pytest.approx(
        4 * reading + cache_bytes(TINY, 17 + 18 + 19, "float32") / 1e9
    )
    step = limit.measure(Work(kind="step", batch=2, length=9, new=1), 0.0)
    assert step == pytest.approx(reading + 2 * cache_bytes(TINY, 10, "float32") / 1e9)
    with pytest.raises(NotImplementedError, match="no limit is known for load"):
        limit.measure(Work(kind="load"), 0.0)


def test_the_least_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    limit = made_up(monkeypatch, tmp_path)
    tables = TINY.n_ctx * TINY.d_model * 4
    assert limit.measure(Work(kind="memory"), 0.0) == weight_bytes(TINY, "float32") + tables


@torch.inference_mode()
def test_a_real_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The ways to multiply that every build has give the product."""
    monkeypatch.setattr(limit_module, "BUFFER", 2**14)
    write_folder(tmp_path, TINY, plain(TINY))
    x, weight = torch.randn(3, 5), torch.randn(5, 7)
    for way in limit_module.WAYS[:2]:
        torch.testing.assert_close(way(weight, 3)(x), x @ weight)
    for dtype in ("float32", "bfloat16"):
        assert Limit(tmp_path, "cpu", dtype).measure(Work(kind="forward", length=2), 0.0) > 0


def test_the_fastest_is_taken_and_what_is_not_there_is_skipped(monkeypatch: pytest.MonkeyPatch):
    def slow() -> None: ...

    def fast() -> None: ...

    def absent() -> Callable[[], object]:
        raise RuntimeError("could not create a primitive descriptor")

    seconds = {slow: 2.0, fast: 1.0}
    monkeypatch.setattr(limit_module, "seconds", lambda call, _: seconds[call])
    monkeypatch.setattr(limit_module, "median_seconds", lambda call, _, at_least: seconds[call])
    assert fastest([absent, lambda: slow, lambda: fast], "cpu") is fast
    assert fastest([lambda: fast, lambda: slow], "cpu") is fast
