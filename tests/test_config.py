import dataclasses
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clean_transformer.config import Config

from .helpers import TINY, configs, tiny, unchecked_types

COUNTS = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx")

not_numbers = st.none() | st.text() | st.lists(st.integers())
not_counts = not_numbers | st.integers(max_value=0) | st.floats() | st.booleans()
not_positive = not_numbers | st.floats(max_value=0) | st.sampled_from([math.inf, math.nan, 0])
IMPOSSIBLE = (
    dict.fromkeys(COUNTS, not_counts)
    | dict.fromkeys(("eps", "initializer_range"), not_positive)
    | {
        "normalization_type": (st.text() | st.none()).filter(lambda x: x not in ("LN", "LNPre")),
        "tied_unembed": st.none() | st.integers() | st.text(),
    }
)


def test_every_field_has_impossible_values():
    assert set(IMPOSSIBLE) == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize("field", IMPOSSIBLE)
@given(data=st.data())
def test_impossible_value_is_refused_by_field_name(field: str, data: st.DataObject):
    value = data.draw(IMPOSSIBLE[field])
    message = re.escape(f"Config.{field} is {value!r}; it must be ")
    with pytest.raises(ValueError, match=message), unchecked_types():
        tiny(**{field: value})


def test_folded_layer_norms_exclude_a_tied_unembedding():
    with pytest.raises(ValueError, match=r"Config\.tied_unembed is True; it must be False with"):
        tiny(normalization_type="LNPre")
    assert tiny(normalization_type="LNPre", tied_unembed=False).normalization_type == "LNPre"


@given(configs())
def test_possible_configs_survive_a_report(cfg: Config):
    assert Config(**json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_axes_name_the_lengths():
    lengths = {"head": 3, "d_model": 12, "d_head": 4, "d_mlp": 20, "d_vocab": 31, "n_ctx": 10}
    assert TINY.axes() == lengths


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.n_layers = 3


@pytest.mark.parametrize(
    ("size", "n_layers", "n_heads", "d_model"),
    [
        ("small", 12, 12, 768),
        ("medium", 24, 16, 1024),
        ("large", 36, 20, 1280),
        ("xl", 48, 25, 1600),
    ],
)
def test_published_sizes(size: str, n_layers: int, n_heads: int, d_model: int):
    cfg = Config.gpt2(size)
    assert (cfg.n_layers, cfg.n_heads, cfg.d_model) == (n_layers, n_heads, d_model)
    assert (cfg.d_head, cfg.d_mlp) == (64, 4 * d_model)
    assert (cfg.d_vocab, cfg.n_ctx, cfg.eps) == (50257, 1024, 1e-5)
    assert cfg.tied_unembed


def test_published_size_with_changes():
    assert Config.gpt2("xl", n_layers=2) == dataclasses.replace(Config.gpt2("xl"), n_layers=2)


def test_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"size 'huge'; choose from \['small', 'medium', 'large'"):
        Config.gpt2("huge")
