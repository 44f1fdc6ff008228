import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clean_transformer.config import Config
from clean_transformer.weights.formats.transformer_lens import HOOKED_TRANSFORMER
from clean_transformer.weights.table import WeightsError

from ...helpers import assert_equal_states, configs, random_model, tiny


# No shape tells the last two.
@given(configs(tied_unembed=False, eps=1e-5, initializer_range=0.02), st.booleans())
def test_its_state_is_ours_with_buffers(cfg: Config, folded: bool):
    if folded:
        cfg = Config(**cfg.to_dict() | {"normalization_type": "LNPre"})
    state = random_model(cfg, b_U=True).state_dict()
    buffers = {
        f"blocks.{layer}.attn.{name}": torch.ones(())
        for layer in range(cfg.n_layers)
        for name in ("mask", "IGNORE")
    }
    assert_equal_states(HOOKED_TRANSFORMER.read(cfg, state | buffers), state)
    assert HOOKED_TRANSFORMER.infer_config(state | buffers) == cfg


def test_other_buffers_are_not_known():
    cfg = tiny(tied_unembed=False)
    state = random_model(cfg).state_dict() | {"blocks.0.attn.rotary_sin": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"unused: blocks\.0\.attn\.rotary_sin$"):
        HOOKED_TRANSFORMER.read(cfg, state)
