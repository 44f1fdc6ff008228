from pathlib import Path

import pytest
import torch

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.references.choose import REFERENCES
from clean_transformer.weights import formats
from clean_transformer.weights.formats.huggingface import HUGGINGFACE, write_folder
from clean_transformer.weights.formats.nanogpt import NANOGPT
from clean_transformer.weights.formats.openai import OPENAI
from clean_transformer.weights.load import (
    FORMATS,
    WEIGHTS,
    discover,
    read_pretrained,
    read_state_dict,
)
from clean_transformer.weights.refusals import WeightsError

from ..helpers import (
    TINY,
    assert_equal_states,
    assert_same_function,
    needs,
    quietly,
    random_model,
    random_state,
    random_tokens,
    reference_model,
    tiny,
)
from .formats.bundles import write_openai


@pytest.mark.parametrize(
    ("known", "tied"),
    [(known, tied) for known in FORMATS for tied in (True, False) if tied or known is not OPENAI],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_format_is_recognized(known, tied: bool):
    cfg = tiny(tied_unembed=tied)
    state = random_state(known, cfg)
    read_cfg, read = read_state_dict(known.write(cfg, state), cfg)
    assert read_cfg == cfg
    assert_equal_states(read, state)


@pytest.mark.filterwarnings("ignore:.* does not show eps; assuming GPT-2.s eps")
@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("tied", [True, False])
def test_state_dict_of_the_reference_itself(installed: str, kind: str, tied: bool):
    needs(kind, installed)
    cfg = tiny(tied_unembed=tied)
    model = random_model(cfg)
    theirs = reference_model(quietly(REFERENCES[kind], cfg, model.state_dict())).state_dict()
    expected = model.state_dict()
    if kind == "hooked":  # its unembedding is a parameter of its own, even where it repeats W_E
        assert {"blocks.0.attn.mask", "blocks.1.attn.IGNORE"} <= theirs.keys()
        cfg, expected = None, expected | {"unembed.W_U": model.unembed.W_U}
    copied = DemoTransformer.from_state_dict(theirs, cfg)
    assert copied.cfg == (cfg or tiny(tied_unembed=False))
    assert_equal_states(copied.state_dict(), expected)
    assert_same_function(copied(random_tokens()), model(random_tokens()))


def test_the_bare_models_state_dict_is_recognized():
    state = random_model().state_dict()
    bare = {
        key.removeprefix("transformer."): tensor
        for key, tensor in HUGGINGFACE.write(TINY, state).items()
    }
    assert_equal_states(read_state_dict(bare, TINY)[1], state)


def test_a_given_config_is_believed_over_the_shapes():
    state = random_model(tiny(n_heads=3, d_head=4)).state_dict()
    cfg = tiny(n_heads=2, d_head=6, eps=1e-6)
    theirs = HUGGINGFACE.write(TINY, state)
    assert read_state_dict(theirs, cfg)[0] == cfg
    with pytest.raises(WeightsError, match="no published GPT-2 has d_model 12"):
        read_state_dict(theirs)


def test_our_own_tied_state_is_inferred_tied_and_the_eps_is_said_to_be_assumed():
    state = random_model(tiny(eps=1e-3)).state_dict()
    with pytest.warns(UserWarning, match=r"does not show eps; assuming .* 1e-5.*cfg=Config"):
        model = DemoTransformer.from_state_dict(state)
    assert model.cfg == TINY
    assert DemoTransformer.from_state_dict(state, tiny(eps=1e-3)).cfg.eps == 1e-3


@pytest.mark.parametrize("known", [HUGGINGFACE, NANOGPT], ids=lambda known: known.name)
def test_heads_that_are_assumed_are_said(known):
    cfg = Config.gpt2("small", n_layers=1, n_heads=8, d_head=96, d_vocab=9, n_ctx=4)
    theirs = known.write(cfg, random_model(cfg, dtype=torch.float32).state_dict())
    message = r"shows neither the number of heads nor eps; assuming 12 heads, .*cfg=Config"
    with pytest.warns(UserWarning, match=message):
        assert read_state_dict(theirs)[0].n_heads == 12
    assert read_state_dict(theirs, cfg)[0].n_heads == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("write", [write_folder, write_openai])
def test_a_folder_arrives_on_the_device_in_the_dtype(tmp_path: Path, device: str, dtype, write):
    if device == "mps" and dtype == torch.float64:
        pytest.skip("mps has no float64")
    tiny_cfg = tiny(d_mlp=48)
    state = random_model(tiny_cfg, dtype=torch.float32).state_dict()
    write(tmp_path, tiny_cfg, state)
    cfg, read = read_pretrained(tmp_path, torch.device(device), dtype)
    assert cfg == tiny_cfg
    assert {tensor.device.type for tensor in read.values()} == {device}
    expected = {name: tensor.to(dtype) for name, tensor in state.items()}
    assert_equal_states({name: tensor.cpu() for name, tensor in read.items()}, expected)


def test_a_file_of_another_kind(tmp_path: Path):
    write_folder(tmp_path, TINY, random_model(dtype=torch.float32).state_dict())
    file = tmp_path / "model.safetensors"
    with pytest.raises(
        WeightsError, match=r"model\.safetensors is not a \.gguf or \.pt or \.pth or \.ckpt file;"
    ):
        read_pretrained(file, torch.device("cpu"), torch.float32)


def test_a_folder_with_the_name_of_a_file(tmp_path: Path):
    write_folder(tmp_path / "model.pt", TINY, random_model(dtype=torch.float32).state_dict())
    assert read_pretrained(tmp_path / "model.pt", torch.device("cpu"), torch.float32)[0] == TINY


def test_no_two_formats_claim_the_same_files():
    suffixes = [suffix for known in FORMATS if known.file for suffix in known.file.suffixes]
    priorities = [known.folder.priority for known in FORMATS if known.folder]
    for claims in (suffixes, priorities, WEIGHTS, [known.name for known in FORMATS]):
        assert len({*claims}) == len(claims)


def test_a_new_format_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "boxes.py").write_text(
        "from dataclasses import replace\n"
        "from clean_transformer.weights.formats.transformer_lens import HOOKED_TRANSFORMER\n"
        "BOXES = replace(HOOKED_TRANSFORMER, name='boxes', marker='box.W_E')\n"
    )
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    found = {known.name for known in discover()}
    assert found == {known.name for known in FORMATS} | {"boxes"}
