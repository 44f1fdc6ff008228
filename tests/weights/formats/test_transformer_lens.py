import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from clean_transformer.config import Config
from clean_transformer.weights.formats.transformer_lens import (
    HOOKED_TRANSFORMER,
    TRANSFORMER_BRIDGE,
)
from clean_transformer.weights.infer import infer_config
from clean_transformer.weights.refusals import WeightsError

from ...helpers import (
    assert_equal_states,
    assert_same_function,
    configs,
    random_model,
    random_tensor,
    tiny,
)

# Square matrices, which would fit transposed as well.
SQUARE = tiny(n_heads=3, d_head=4, d_model=12, d_mlp=12, d_vocab=12, n_ctx=12, tied_unembed=False)


# No shape tells the last two.
@pytest.mark.filterwarnings("ignore:.* does not show eps; assuming GPT-2.s eps")
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
    assert infer_config(HOOKED_TRANSFORMER, state | buffers) == cfg


def test_other_buffers_are_not_known():
    cfg = tiny(tied_unembed=False)
    state = random_model(cfg).state_dict() | {"blocks.0.attn.rotary_sin": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"unused: blocks\.0\.attn\.rotary_sin$"):
        HOOKED_TRANSFORMER.read(cfg, state)


def test_square_matrices_do_what_ours_do():
    model, x = random_model(SQUARE, b_U=True), random_tensor(2, 5, SQUARE.d_model)
    theirs = TRANSFORMER_BRIDGE.write(SQUARE, model.state_dict())
    block, _, cache = "blocks.1", *model.blocks[1].attn.run_with_cache(x)

    for letter in "qkv":  # nn.Linear's layout
        weight, bias = (
            theirs[f"{block}.attn.{letter}.weight"],
            theirs[f"{block}.attn.{letter}.bias"],
        )
        assert_same_function(F.linear(x, weight, bias), cache[letter].flatten(2))
    # Conv1D's layout
    out = cache["z"].flatten(2) @ theirs[f"{block}.attn.o.weight"] + theirs[f"{block}.attn.o.bias"]
    assert_same_function(out, model.blocks[1].attn(x))
    pre = x @ theirs[f"{block}.mlp.in.weight"] + theirs[f"{block}.mlp.in.bias"]
    post = F.gelu(pre, approximate="tanh")
    mlp_out = post @ theirs[f"{block}.mlp.out.weight"] + theirs[f"{block}.mlp.out.bias"]
    assert_same_function(mlp_out, model.blocks[1].mlp(x))
    logits = F.linear(x, theirs["unembed.weight"], theirs["unembed.bias"])
    assert_same_function(logits, model.unembed(x))
    assert torch.equal(theirs["embed.weight"], model.embed.W_E)
    assert torch.equal(theirs["pos_embed.weight"], model.pos_embed.W_pos)
