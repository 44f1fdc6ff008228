"""The breakdown of a token and of a forward pass: every weight is seen to be used, once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import typer
from torch.profiler import profile

from benchmarks import breakdown
from benchmarks.breakdown import bytes_read, decoder, flops, operations, reader, table, trainer
from clean_transformer import DemoTransformer
from clean_transformer.benchmark.contestants.limit import products, weight_bytes
from clean_transformer.benchmark.running.models import TINY
from clean_transformer.inference import fast_modules
from clean_transformer.inference.int8 import TILE
from clean_transformer.inference.matmuls import Matmul, OneDNN, has_onednn
from clean_transformer.weights.synthetic import stress

PRODUCTS = {
    "Matmul": Matmul(),
}
if has_onednn():
    PRODUCTS["OneDNN"] = OneDNN()


def profiled(monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[..., Any]) -> Any:
    """The events of three calls by that product; `call` makes one of an optimized model."""
    monkeypatch.setattr(fast_modules, "kernel_for", lambda *_: PRODUCTS.get(name, Matmul()))
    model = DemoTransformer.from_state_dict(stress(TINY), TINY)
    with torch.inference_mode():
        model.optimize("int8" if name == "int8" else None)
        one = call(model)
        with profile(record_shapes=True) as profiler:
            for _ in range(3):
                one()
    return profiler.key_averages(group_by_input_shape=True)


@pytest.mark.parametrize("name", [*PRODUCTS, "int8"])
def test_each_token_reads_each_weight_once(monkeypatch: pytest.MonkeyPatch, name: str):
    events = profiled(monkeypatch, name, partial(decoder, context=5, new=8))
    itemsize = 1 if name == "int8" else 4
    rows = operations(events, 3, partial(bytes_read, itemsize=itemsize))

    least = weight_bytes(TINY, "int8" if itemsize == 1 else "float32")
    padding = TINY.d_model * (-TINY.d_vocab % TILE) if name == "int8" else 0
    assert sum(r.amount for r in rows) == least + padding
    assert sum(row.times for row in rows if row.amount) == 4 * TINY.n_layers + 1
    assert rows == sorted(rows, key=lambda row: -row.seconds)
    assert table(rows, taken=1.0, rate="GB/s").row_count == 13


@pytest.mark.parametrize("name", PRODUCTS)
def test_each_pass_multiplies_with_each_weight_once(monkeypatch: pytest.MonkeyPatch, name: str):
    rows = operations(profiled(monkeypatch, name, partial(reader, batch=2, length=7)), 3, flops)
    expected = sum(count * shape.flops for shape, count in products(TINY, 14, 14).items())
    assert sum(row.amount for row in rows) == pytest.approx(expected)


def test_each_step_multiplies_three_times_with_each_weight():
    model = DemoTransformer.from_state_dict(stress(TINY), TINY)
    step = trainer(model, batch=2, length=8)
    with profile(record_shapes=True) as profiler:
        for _ in range(3):
            step()
    rows = operations(profiler.key_averages(group_by_input_shape=True), 3, flops)
    weights = 3 * sum(count * shape.flops for shape, count in products(TINY, 14, 14).items())
    done = sum(row.amount for row in rows)
    assert done == pytest.approx(weights)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "also", [{}, {"length": 8, "dtype": "int8"}, {"length": 8, "compiled": True}]
)
def test_a_training_step_is_that_of_the_plain_model(also: dict[str, Any]):
    with pytest.raises(typer.BadParameter, match="--training needs --length, and float32"):
        breakdown.main(training=True, **also)
