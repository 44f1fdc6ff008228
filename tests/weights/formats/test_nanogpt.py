from pathlib import Path

import pytest
import torch
from torch import nn

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.faults import inject
from clean_transformer.weights.formats.huggingface import HUGGINGFACE
from clean_transformer.weights.formats.nanogpt import NANOGPT, NANOGPT_WITHOUT_BIASES
from clean_transformer.weights.load import FORMATS, read_state_dict
from clean_transformer.weights.refusals import WeightsError
from clean_transformer.weights.table import detect

from ...helpers import (
    assert_equal_states,
    assert_same_function,
    random_model,
    random_tokens,
    randomized,
    tiny,
)
from .linear_gpt import LinearGPT

CFG = tiny(d_mlp=48)  # nanoGPT's and minGPT's MLPs are four times as wide as the model
UNTIED = tiny(d_mlp=48, tied_unembed=False)
ARGS = {"n_layer": 2, "n_head": 3, "n_embd": 12, "block_size": 10, "vocab_size": 31, "bias": True}
EXACT_GELU = r"exact GELU since June 2023.*replace the mlp of each block"


def save(file: Path, theirs: nn.Module, **changes) -> Path:
    """Save a checkpoint as nanoGPT's training does."""
    optimizer = torch.optim.AdamW(theirs.parameters()).state_dict()
    checkpoint = {"model": theirs.state_dict(), "optimizer": optimizer, "model_args": ARGS}
    torch.save(checkpoint | {"iter_num": 7, "best_val_loss": torch.tensor(1.5)} | changes, file)
    return file


# What the weights compute.


@pytest.mark.parametrize("cfg", [CFG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_their_state_dict_gives_their_logits(cfg: Config, masks: bool, bias: bool):
    theirs = randomized(LinearGPT(cfg, bias=bias, masks=masks))
    ours = DemoTransformer.from_state_dict(theirs.state_dict(), cfg)
    assert_same_function(ours(random_tokens()), theirs(random_tokens()))
    assert bias == any(name.endswith(".b_O") and b.any() for name, b in ours.named_parameters())


@torch.no_grad()
def test_the_exact_gelu_is_another_function_and_the_only_difference():
    theirs = randomized(LinearGPT(CFG, gelu="none"))
    ours = DemoTransformer.from_state_dict(theirs.state_dict(), CFG)
    with pytest.raises(AssertionError):
        assert_same_function(ours(random_tokens()), theirs(random_tokens()))
    with inject("exact-gelu"):
        assert_same_function(ours(random_tokens()), theirs(random_tokens()))


# Which format it is: the names are Hugging Face's.


def test_square_matrices_do_not_hide_the_layout():
    cfg = tiny(d_mlp=12, d_vocab=12, n_ctx=12, tied_unembed=False)
    state = random_model(cfg).state_dict()
    for known in (HUGGINGFACE, NANOGPT):
        theirs = known.write(cfg, state)
        assert detect(FORMATS, theirs) is known
        assert_equal_states(read_state_dict(theirs, cfg)[1], state)


def test_the_layouts_differ_in_the_four_matrices_of_a_block():
    state = random_model(CFG).state_dict()
    linear, conv1d = NANOGPT.write(CFG, state), HUGGINGFACE.write(CFG, state)
    assert linear.keys() == conv1d.keys()
    transposed = {key for key in linear if linear[key].shape != conv1d[key].shape}
    square = {f"transformer.h.{layer}.attn.c_proj.weight" for layer in range(2)}
    for key in transposed | square:
        assert torch.equal(linear.pop(key), conv1d.pop(key).T)
    assert len(transposed | square) == 4 * CFG.n_layers
    assert_equal_states(linear, conv1d)


def test_one_missing_bias_is_missing_and_one_bias_too_many_is_unused():
    state = LinearGPT(CFG).state_dict()
    del state["transformer.h.1.mlp.c_fc.bias"]
    with pytest.raises(WeightsError, match=r"missing: transformer\.h\.1\.mlp\.c_fc\.bias$"):
        read_state_dict(state, CFG)
    state = LinearGPT(CFG, bias=False).state_dict()
    state["transformer.ln_f.bias"] = torch.zeros(12)
    with pytest.raises(WeightsError, match=r"without biases.*unused: transformer\.ln_f\.bias$"):
        read_state_dict(state, CFG)


def test_a_missing_bias_of_hugging_face_is_missing():
    theirs = HUGGINGFACE.write(CFG, random_model(CFG).state_dict())
    del theirs["transformer.h.0.attn.c_attn.bias"]
    with pytest.raises(WeightsError, match=r"Hugging Face GPT-2 .*: transformer\.h\.0\.attn\.c_at"):
        read_state_dict(theirs, CFG)


def test_what_has_a_bias_does_not_fit_without():
    state = random_model(CFG).state_dict()
    with pytest.raises(WeightsError, match=r"no place for ln_final\.b, which is not zero"):
        NANOGPT_WITHOUT_BIASES.write(CFG, state)


@pytest.mark.filterwarnings("ignore:.*assuming 12 heads")
@pytest.mark.parametrize("bias", [True, False])
def test_a_published_width_tells_the_architecture(bias: bool):
    cfg = Config.gpt2("small", n_layers=1, d_vocab=64, n_ctx=5)
    assert read_state_dict(LinearGPT(cfg, bias=bias).state_dict())[0] == cfg


@pytest.mark.parametrize("prefix", ["_orig_mod.", "transformer.h.1._orig_mod."])
def test_names_of_a_compiled_module(prefix: str):
    theirs = LinearGPT(CFG).state_dict()
    inside = prefix.removesuffix("_orig_mod.")
    compiled = {
        prefix + key.removeprefix(inside) if key.startswith(inside) else key: tensor
        for key, tensor in theirs.items()
    }
    assert compiled.keys() != theirs.keys()
    assert_equal_states(read_state_dict(compiled, CFG)[1], read_state_dict(theirs, CFG)[1])


# Their files.


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_checkpoint_of_nanogpt_says_what_it_is(tmp_path: Path, bias: bool):
    theirs = randomized(LinearGPT(CFG, bias=bias))
    file = save(tmp_path / "ckpt.pt", theirs)
    with pytest.warns(UserWarning, match=EXACT_GELU):
        ours = DemoTransformer.from_pretrained(file, device="cpu", dtype=torch.float64)
    assert ours.cfg == CFG
    assert_same_function(ours(random_tokens()), theirs(random_tokens()))


@pytest.mark.filterwarnings("ignore:.*assuming 12 heads")
@torch.no_grad()
def test_a_bare_state_dict_says_less(tmp_path: Path):
    cfg = Config.gpt2("small", n_layers=1, d_vocab=64, n_ctx=9, tied_unembed=False)
    theirs = randomized(LinearGPT(cfg, masks=True))
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    ours = DemoTransformer.from_pretrained(tmp_path / "model.pt", dtype=torch.float64)
    assert ours.cfg == cfg
    assert_same_function(ours(random_tokens(cfg)), theirs(random_tokens(cfg)))

    torch.save(LinearGPT(UNTIED).state_dict(), tmp_path / "model.pt")
    message = r"number of heads.* pass cfg=Config\(\.\.\.\) to from_state_dict$"
    with pytest.raises(WeightsError, match=message):
        DemoTransformer.from_pretrained(tmp_path / "model.pt")


def refused(file: Path, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DemoTransformer.from_pretrained(file, device="cpu")


def test_a_missing_file(tmp_path: Path):
    refused(tmp_path / "ckpt.pt", FileNotFoundError, r"ckpt\.pt does not exist$")


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_file(tmp_path: Path, kept: int):
    file = save(tmp_path / "ckpt.pt", LinearGPT(CFG))
    file.write_bytes(file.read_bytes()[:kept])
    refused(file, WeightsError, r"ckpt\.pt is damaged \(.*\); copy or download it again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "contains a Tensor, not a state dict"),
        ({"state_dict": {}, "epoch": 3}, r"\['state_dict', 'epoch'\] are not tensors; load the"),
        ({"encoder.weight": torch.ones(2)}, "a state dict of none of the known formats"),
    ],
)
def test_another_content(tmp_path: Path, content, message: str):
    torch.save(content, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", WeightsError, message)


@pytest.mark.filterwarnings("ignore:nanoGPT has computed the exact GELU")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, r"ckpt\.pt: model_args has no 'n_embd'"),
        (ARGS | {"n_head": 5}, "n_embd 12 is not a multiple of 5 heads"),
        (ARGS | {"n_layer": 3}, r"missing: transformer\.h\.2\.ln_1\.weight, "),
        (
            ARGS | {"vocab_size": 32},
            r"wrong shape: transformer\.wte\.weight \(31, 12\) instead of",
        ),
    ],
)
def test_impossible_architecture(tmp_path: Path, args: dict, message: str):
    refused(save(tmp_path / "ckpt.pt", LinearGPT(CFG), model_args=args), WeightsError, message)


@pytest.mark.filterwarnings("ignore:nanoGPT has computed the exact GELU")
def test_a_head_that_training_untied_is_not_dropped(tmp_path: Path):
    file = save(tmp_path / "ckpt.pt", LinearGPT(UNTIED))
    refused(file, WeightsError, "has its own unembedding")
