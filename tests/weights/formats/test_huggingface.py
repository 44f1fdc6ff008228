import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from clean_transformer.config import Config
from clean_transformer.weights.formats.huggingface import (
    HUGGINGFACE,
    config_from_json,
    config_to_json,
    read_folder,
    write_folder,
)
from clean_transformer.weights.refusals import WeightsError

from ...helpers import (
    TINY,
    assert_equal_states,
    assert_same_function,
    configs,
    random_model,
    random_tensor,
    random_tokens,
    tiny,
)

# Square matrices, which would fit transposed as well.
SQUARE = tiny(n_heads=3, d_head=4, d_model=12, d_mlp=12, d_vocab=12, n_ctx=12, tied_unembed=False)


# Architectures that are no plain GPT-2, and how to make ours the same, as the error says.
OTHERS = {
    "inverse layer": (
        {"scale_attn_by_inverse_layer_idx": True},
        "divide W_Q and b_Q of each block i by i + 1",
        lambda block, i: [block.attn.W_Q.div_(i + 1), block.attn.b_Q.div_(i + 1)],
    ),
    "unscaled": (
        {"scale_attn_weights": False},
        "multiply W_Q and b_Q of each block by the square root of d_head",
        lambda block, i: [block.attn.W_Q.mul_(2), block.attn.b_Q.mul_(2)],
    ),
    "the same GELU": ({"activation_function": "gelu_fast"}, None, lambda block, i: None),
    "another name": ({"activation_function": "gelu_accurate"}, None, lambda block, i: None),
}


@torch.no_grad()
@pytest.mark.parametrize(("fields", "advice", "follow"), OTHERS.values(), ids=OTHERS)
def test_advice_for_another_architecture_gives_its_logits(fields, advice, follow):
    # The fused attention of older versions ignores the factors of the scores.
    transformers = pytest.importorskip("transformers", minversion="5.24")
    model = random_model(dtype=torch.float32)  # gelu_fast has a constant with only 10 digits
    config = config_to_json(TINY) | fields
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    theirs.load_state_dict(HUGGINGFACE.write(TINY, model.state_dict()), strict=False)
    for i, block in enumerate(model.blocks):
        follow(block, i)
    tokens = random_tokens()
    assert_same_function(model(tokens), theirs(tokens).logits)
    if advice is None:
        assert config_from_json(config) == TINY
    else:
        with pytest.raises(WeightsError, match=re.escape(advice)):
            config_from_json(config)


def test_square_matrices_do_what_ours_do():
    model, x = random_model(SQUARE), random_tensor(2, 5, SQUARE.d_model)
    theirs = HUGGINGFACE.write(SQUARE, model.state_dict())
    _, cache = model.blocks[1].attn.run_with_cache(x)

    def conv1d(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ theirs[f"transformer.h.1.{name}.weight"] + theirs[f"transformer.h.1.{name}.bias"]

    qkv = torch.cat([cache[letter].flatten(2) for letter in "qkv"], dim=-1)
    assert_same_function(conv1d("attn.c_attn", x), qkv)
    assert_same_function(conv1d("attn.c_proj", cache["z"].flatten(2)), model.blocks[1].attn(x))
    post = F.gelu(conv1d("mlp.c_fc", x), approximate="tanh")
    assert_same_function(conv1d("mlp.c_proj", post), model.blocks[1].mlp(x))
    assert_same_function(F.linear(x, theirs["lm_head.weight"]), model.unembed(x))
    assert torch.equal(theirs["transformer.wte.weight"], model.embed.W_E)
    assert torch.equal(theirs["transformer.wpe.weight"], model.pos_embed.W_pos)


@given(configs())
def test_a_config_survives_json(cfg: Config):
    assert config_from_json(config_to_json(cfg)) == cfg


def test_the_published_config_is_gpt2_small():
    # https://huggingface.co/openai-community/gpt2/blob/main/config.json, without generation
    published = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "vocab_size": 50257,
    }
    assert config_from_json(published) == Config.gpt2("small")
    del published["n_positions"]
    assert config_from_json(published | {"n_inner": None}) == Config.gpt2("small")
    with pytest.raises(WeightsError, match=r"config\.json has no 'n_ctx'"):
        config_from_json({key: value for key, value in published.items() if key != "n_ctx"})


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_keeps_every_bit(tmp_path: Path, tied: bool):
    cfg = tiny(tied_unembed=tied)
    state = random_model(cfg).state_dict()
    write_folder(tmp_path, cfg, state)
    read, theirs = read_folder(tmp_path)
    assert read == cfg
    assert_equal_states(theirs, HUGGINGFACE.write(cfg, state))


def test_the_bare_models_names_get_their_prefix_except_the_head():
    bare = {"wte.weight": torch.ones(1), "h.0.ln_1.weight": torch.ones(1)}
    head = {"lm_head.weight": torch.ones(1)}
    assert [*HUGGINGFACE.full_names(bare | head)] == [
        "transformer.wte.weight",
        "transformer.h.0.ln_1.weight",
        "lm_head.weight",
    ]
    full = HUGGINGFACE.full_names(bare)
    assert [*HUGGINGFACE.full_names(full | head)] == [*full, *head]


@pytest.mark.parametrize("mask", ["bias", "masked_bias"])
def test_masks_of_old_checkpoints_are_buffers_but_biases_are_not(mask: str):
    state = random_model().state_dict()
    theirs = HUGGINGFACE.write(TINY, state)
    masks = {f"transformer.h.1.attn.{mask}": torch.ones(1, 1, 10, 10)}
    assert_equal_states(HUGGINGFACE.read(TINY, theirs | masks), state)
    del theirs["transformer.h.1.attn.c_proj.bias"]
    with pytest.raises(WeightsError, match=r"missing: transformer\.h\.1\.attn\.c_proj\.bias$"):
        HUGGINGFACE.read(TINY, theirs | masks)
