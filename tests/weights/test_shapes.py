import math

import pytest

from clean_transformer.config import Config
from clean_transformer.weights.shapes import parameter_shapes


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"tied_unembed": False}, 163_087_441),  # HookedTransformer's layout
        ({"tied_unembed": False, "normalization_type": "LNPre"}, 163_049_041),  # after fold_ln
        ({}, 124_439_808 + 50_257),  # Hugging Face's 124M, and b_U
    ],
)
def test_parameter_count_of_gpt2_small(changes: dict, count: int):
    shapes = parameter_shapes(Config.gpt2("small", **changes)).values()
    assert sum(math.prod(shape) for shape in shapes) == count


@pytest.mark.parametrize(
    ("size", "millions"), [("small", 124), ("medium", 355), ("large", 774), ("xl", 1558)]
)
def test_published_sizes_have_their_published_counts(size: str, millions: int):
    cfg = Config.gpt2(size)
    count = sum(math.prod(shape) for shape in parameter_shapes(cfg).values()) - cfg.d_vocab
    assert round(count / 1e6) == millions
