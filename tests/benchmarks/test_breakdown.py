"""The breakdown of a decoded token: every weight is seen to be read, once."""

import pytest
import torch
from torch.profiler import profile

from benchmarks.breakdown import decoder, operations, table
from benchmarks.models import TINY
from benchmarks.roofline import weight_bytes
from clean_transformer import DemoTransformer, optimize
from clean_transformer.products import Choice, OneDNN, Product, WithoutBias, in_onednn
from clean_transformer.weights.synthetic import stress

PRODUCTS = {"Product": Product(), "WithoutBias": WithoutBias()}
if in_onednn(torch.float32):
    PRODUCTS["OneDNN"] = OneDNN()


@pytest.mark.parametrize("name", [*PRODUCTS, "int8"])
def test_each_token_reads_each_weight_once(monkeypatch: pytest.MonkeyPatch, name: str):
    choice = Choice({1: PRODUCTS.get(name, Product())}, transposed=False)
    monkeypatch.setattr(optimize, "fastest_for_blocks", lambda *_: choice)
    monkeypatch.setattr(optimize, "fastest_for_unembed", lambda *_: choice)
    weights = "int8" if name == "int8" else None
    model = DemoTransformer.from_state_dict(stress(TINY), TINY)
    with torch.inference_mode():
        model.optimize(weights)
        step = decoder(model, context=5, new=8)
        with profile(record_shapes=True) as profiled:
            for _ in range(3):
                step()

    events = profiled.key_averages(group_by_input_shape=True)
    rows = operations(events, tokens=3, itemsize=1 if weights else 4)

    assert sum(row.read for row in rows) == weight_bytes(TINY, weights or "float32")
    assert sum(row.times for row in rows if row.read) == 4 * TINY.n_layers + 1
    assert rows == sorted(rows, key=lambda row: -row.seconds)
    assert table(rows, taken=1.0).row_count == 13
