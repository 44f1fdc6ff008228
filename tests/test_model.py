import json
import re
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.swapping.swaps import swap
from clean_transformer.variants.mlp import ReluMLP
from clean_transformer.weights.formats.huggingface import HUGGINGFACE, config_to_json
from clean_transformer.weights.refusals import WeightsError
from clean_transformer.weights.shapes import parameter_shapes

from .conftest import ROOT
from .helpers import (
    TINY,
    assert_equal_states,
    configs,
    random_model,
    random_tokens,
    tiny,
    unchecked_types,
)

TOKENS = random_tokens()


# Parameters and forward pass.


@given(configs(), st.booleans())
def test_parameters_are_those_of_the_shape_table(cfg: Config, folded: bool):
    if folded:
        cfg = Config(**cfg.to_dict() | {"normalization_type": "LNPre", "tied_unembed": False})
    state = DemoTransformer(cfg).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == parameter_shapes(cfg)


@pytest.mark.parametrize(
    ("normalization_type", "count"), [("LN", 163_087_441), ("LNPre", 163_049_041)]
)
def test_parameter_count_of_gpt2_small_untied(normalization_type: str, count: int):
    cfg = Config.gpt2("small", normalization_type=normalization_type, tied_unembed=False)
    with torch.device("meta"):
        model = DemoTransformer(cfg)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_forward_is_the_sum_of_its_modules():
    model = random_model()
    residual = model.embed(TOKENS) + model.pos_embed(TOKENS)
    for block in model.blocks:
        residual = block(residual)
    assert torch.equal(model(TOKENS), model.unembed(model.ln_final(residual)))


def test_int32_tokens_are_the_same_tokens():
    model = random_model()
    assert torch.equal(model(TOKENS.int()), model(TOKENS))


def test_one_token_and_a_full_context():
    model = random_model()
    assert model(TOKENS[:, :1]).shape == (2, 1, TINY.d_vocab)
    assert model(random_tokens(length=TINY.n_ctx)).shape == (2, TINY.n_ctx, TINY.d_vocab)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype):
    logits = random_model(dtype=dtype)(TOKENS)
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_a_deep_copy_is_another_model():
    model = random_model()
    copied, logits = deepcopy(model), model(TOKENS)
    assert torch.equal(copied(TOKENS), logits)
    with torch.no_grad():
        copied.embed.W_E.zero_()
    assert torch.equal(model(TOKENS), logits)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (
            torch.tensor([[0, 31]]),
            ValueError,
            "ids run from 0 to 31; this vocabulary has ids 0 to 30",
        ),
        (
            torch.tensor([[3, -1]]),
            ValueError,
            "ids run from -1 to 3; this vocabulary has ids 0 to 30",
        ),
        (
            torch.tensor([[1.0, 2.0]]),
            TypeError,
            "tokens are torch.float32; they must be int64 or int32",
        ),
        (torch.tensor([[True]]), TypeError, "tokens are torch.bool; they must be int64 or int32"),
        (
            torch.zeros(1, 11, dtype=int),
            ValueError,
            "11 tokens are more than the n_ctx=10 positions",
        ),
        (torch.zeros(1, 0, dtype=int), ValueError, r"shape \[1, 0\]; they must be \[batch pos\]"),
        (torch.zeros(0, 3, dtype=int), ValueError, r"shape \[0, 3\]; they must be \[batch pos\]"),
        (torch.zeros(3, dtype=int), ValueError, r"shape \[3\]; they must be \[batch pos\]"),
    ],
)
def test_impossible_tokens_are_refused_before_any_work(tokens, error, message: str):
    model, calls = random_model(), []
    model.embed.register_forward_pre_hook(lambda *_: calls.append("embed"))
    with pytest.raises(error, match=message), unchecked_types():
        model(tokens)
    assert not calls


# Folders: Hugging Face's and our own.


@pytest.fixture
def gpt2_lm_head_model():
    """Builds Hugging Face's model of an architecture, with random gains and biases too."""
    transformers = pytest.importorskip("transformers")

    def build(cfg: Config, dtype: torch.dtype = torch.float64):
        end = cfg.d_vocab - 1
        fields = config_to_json(cfg) | {"bos_token_id": end, "eos_token_id": end}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        return model.to(dtype)

    return build


def largest_relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_folder_of_hugging_face_gives_its_logits(gpt2_lm_head_model, tmp_path: Path, tied: bool):
    hf_model = gpt2_lm_head_model(tiny(tied_unembed=tied))
    hf_model.save_pretrained(tmp_path)
    model = DemoTransformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float64)
    assert model.cfg == tiny(tied_unembed=tied)
    assert largest_relative_error(model(TOKENS), hf_model(TOKENS).logits) <= 5e-13


@torch.no_grad()
def test_folder_of_hugging_face_gives_its_logits_in_float32(gpt2_lm_head_model, tmp_path: Path):
    hf_model = gpt2_lm_head_model(TINY, torch.float32)
    hf_model.save_pretrained(tmp_path)
    model = DemoTransformer.from_pretrained(tmp_path, device="cpu")
    exact = deepcopy(model).double()
    # To first order, the logits err by what the roundings behind each activation do to them. One
    # unit up or down at random in every element shows how far that carries; the longest sum behind
    # an activation, of d_mlp products and a bias, may round as often as it is long, all one way
    # (Higham 2002, section 3.1).
    logits, carried = exact(TOKENS), 0.0
    unit = torch.finfo(torch.float32).eps / 2
    for name in exact.default_points():
        moved = exact.run_with_hooks(
            TOKENS, fwd_hooks=[(name, lambda a, hook: a * (1 + unit * torch.randn_like(a).sign()))]
        )
        carried += (moved - logits).abs().max()
    bound = (TINY.d_mlp + 1) * carried
    assert (model(TOKENS) - logits).abs().max() <= bound
    assert (hf_model(TOKENS).logits - logits).abs().max() <= bound
    assert (model(TOKENS) - hf_model(TOKENS).logits).abs().max() <= 2 * bound
    assert bound < 1e-3 * logits.abs().max()  # so that another formula would exceed it


@torch.no_grad()
def test_shards_and_pickles_of_hugging_face(gpt2_lm_head_model, tmp_path: Path):
    hf_model = gpt2_lm_head_model(TINY)
    hf_model.save_pretrained(tmp_path / "whole")
    hf_model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert len([*(tmp_path / "shards").glob("model-*.safetensors")]) > 1
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle/config.json").write_bytes((tmp_path / "whole/config.json").read_bytes())
    torch.save(hf_model.state_dict(), tmp_path / "pickle/pytorch_model.bin")

    states = [
        DemoTransformer.from_pretrained(tmp_path / kind, dtype=torch.float64).state_dict()
        for kind in ("whole", "shards", "pickle")
    ]
    assert_equal_states(states[0], states[1])
    assert_equal_states(states[0], states[2])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_saving_and_loading_keep_every_bit(tmp_path: Path, tied: bool, dtype: torch.dtype):
    model = random_model(tiny(tied_unembed=tied), dtype=dtype)
    model.save_pretrained(tmp_path / "new/folder")
    loaded = DemoTransformer.from_pretrained(tmp_path / "new/folder", device="cpu", dtype=dtype)
    assert loaded.cfg == model.cfg
    assert_equal_states(loaded.state_dict(), model.state_dict())
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_hugging_face_loads_what_we_save(tmp_path: Path, tied: bool):
    transformers = pytest.importorskip("transformers")
    model = random_model(tiny(tied_unembed=tied))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        hf_model, report = transformers.GPT2LMHeadModel.from_pretrained(
            tmp_path, dtype=torch.float64, output_loading_info=True
        )
    assert not any(report.values()), report
    assert largest_relative_error(model(TOKENS), hf_model(TOKENS).logits) <= 5e-13


def test_a_loaded_model_can_be_trained_and_leaves_the_file_alone(tmp_path: Path):
    random_model(dtype=torch.float32).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = DemoTransformer.from_pretrained(tmp_path)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(TOKENS).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_saving_again_over_the_loaded_file(tmp_path: Path):
    random_model(dtype=torch.float32).save_pretrained(tmp_path)
    model = DemoTransformer.from_pretrained(tmp_path, device="cpu")
    with torch.no_grad():
        model.embed.W_E.mul_(2)
    model.save_pretrained(tmp_path)
    again = DemoTransformer.from_pretrained(tmp_path, device="cpu")
    assert_equal_states(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("broken", ["safetensors.torch.save_file", "json.dumps"])
def test_an_interrupted_save_leaves_the_old_model(tmp_path: Path, monkeypatch, broken: str):
    old = random_model(dtype=torch.float32)
    old.save_pretrained(tmp_path)

    def break_off(what, file=None, **options):
        if file:
            Path(file).write_bytes(b"half a fi")
        raise KeyboardInterrupt

    new = random_model(seed=1)
    monkeypatch.setattr(broken, break_off)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()

    kept = DemoTransformer.from_pretrained(tmp_path, device="cpu")
    assert_equal_states(kept.state_dict(), old.state_dict())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def with_relu() -> DemoTransformer:
    model = random_model()
    swap(model, "blocks.0.mlp", ReluMLP)
    return model


class ReluTransformer(DemoTransformer):
    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.blocks[0].mlp = ReluMLP(cfg)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (random_model(b_U=True), "has no place for unembed.b_U, which is not zero"),
        (
            random_model(tiny(normalization_type="LNPre", tied_unembed=False)),
            "has no place for folded LayerNorms",
        ),
        (with_relu(), "blocks.0.mlp is ReluMLP, which config.json cannot say"),
        (ReluTransformer(TINY), "blocks.0.mlp is ReluMLP, which config.json cannot say"),
        (random_model(tiny(d_head=5)), "needs n_heads × d_head = d_model, not 3 × 5 = 12"),
    ],
    ids=["b_U", "LNPre", "ReluMLP", "subclass", "d_head"],
)
def test_a_model_without_a_place_in_the_format_writes_nothing(tmp_path: Path, model, message: str):
    with pytest.raises(WeightsError, match=message):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# What from_pretrained refuses.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model(dtype=torch.float32).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors of the file."""
    state = load_file(folder / "model.safetensors")
    change(state)
    state = {key: tensor.clone().contiguous() for key, tensor in state.items()}
    save_file(state, folder / "model.safetensors")


def refused(folder: Path, error: type[Exception], message: str) -> str:
    with pytest.raises(error, match=message) as refusal:
        DemoTransformer.from_pretrained(folder, device="cpu")
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_file(folder: Path, kept: int):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(
        folder, WeightsError, r"model\.safetensors is damaged \(.*\); copy or download it again"
    )


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_truncated_pickle(folder: Path, kept: int):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:kept])
    refused(
        folder, WeightsError, r"pytorch_model\.bin is damaged \(.*\); copy or download it again"
    )


def test_pickle_that_runs_code(folder: Path):
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": subprocess.Popen}, folder / "pytorch_model.bin")
    refused(folder, WeightsError, r"pytorch_model\.bin wants to run code .*: it calls .*Popen")


def test_missing_unused_and_wrongly_shaped_keys_are_named_in_one_error(folder: Path):
    def damage(state):
        del state["transformer.h.1.attn.c_proj.bias"]
        state["transformer.h.2.ln_1.weight"] = torch.ones(12)
        state["transformer.h.0.mlp.c_fc.weight"] = state["transformer.h.0.mlp.c_fc.weight"].T

    rewrite(folder, damage)
    assert refused(folder, WeightsError, "not a complete Hugging Face GPT-2") == (
        f"{folder}: this is not a complete Hugging Face GPT-2 state dict; "
        "missing: transformer.h.1.attn.c_proj.bias; "
        "unused: transformer.h.2.ln_1.weight; "
        "of the wrong shape: transformer.h.0.mlp.c_fc.weight (20, 12) instead of (12, 20)"
    )


def test_foreign_checkpoint(folder: Path):
    def foreign(state):
        state.clear()
        state["bert.encoder.weight"] = torch.ones(2)

    rewrite(folder, foreign)
    message = refused(folder, WeightsError, "unused: bert.encoder.weight")
    assert "missing: transformer.wte.weight, " in message


def test_an_unembedding_of_its_own_is_not_dropped(folder: Path):
    def untie(state):
        state["lm_head.weight"] = state["transformer.wte.weight"] + 1

    rewrite(folder, untie)
    refused(
        folder, WeightsError, r"uses the embedding as the unembedding; set tied_unembed .* to false"
    )


def test_a_repeated_embedding_and_old_masks_are_passed_over(folder: Path):
    before = DemoTransformer.from_pretrained(folder, device="cpu").state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}

    def repeat_and_mask(state):
        state["lm_head.weight"] = state["transformer.wte.weight"]
        state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 10, 10)
        state["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(folder, repeat_and_mask)
    after = DemoTransformer.from_pretrained(folder, device="cpu").state_dict()
    assert_equal_states(after, before)


def test_names_of_the_bare_model_are_known(folder: Path):
    before = DemoTransformer.from_pretrained(folder, device="cpu").state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}

    def strip(state):
        for key in [*state]:
            state[key.removeprefix("transformer.")] = state.pop(key)

    rewrite(folder, strip)
    after = DemoTransformer.from_pretrained(folder, device="cpu").state_dict()
    assert_equal_states(after, before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "gpt_neox"}, WeightsError, r"model_type='gpt_neox'; supported: \['gpt2'\]"),
        ({"activation_function": "gelu"}, WeightsError, "activation_function='gelu'; supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, WeightsError, "by_inverse_layer_idx=True"),
        ({"scale_attn_weights": False}, WeightsError, "scale_attn_weights=False"),
        ({"add_cross_attention": True}, WeightsError, "add_cross_attention=True"),
        ({"n_head": 5}, WeightsError, "n_embd 12 is not a multiple of 5 heads"),
        ({"n_head": 0}, WeightsError, "positive integers, not 12 and 0"),
        ({"n_layer": -1}, ValueError, r"n_layers is -1; it must be a positive integer"),
        ({"n_layer": 3}, WeightsError, r"missing: transformer\.h\.2\.ln_1\.weight, "),
        ({"n_layer": 1}, WeightsError, r"unused: transformer\.h\.1\."),
        ({"tie_word_embeddings": False}, WeightsError, r"missing: lm_head\.weight$"),
    ],
)
def test_impossible_architecture(folder: Path, changes: dict, error, message: str):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    refused(folder, error, message)


def test_config_without_a_field(folder: Path):
    (folder / "config.json").write_text('{"n_embd": 12, "n_head": 3}')
    refused(folder, WeightsError, "config.json has no 'n_layer'")


@pytest.mark.parametrize("text", ["", '{"n_embd": 12', "[]"])
def test_config_that_is_no_json_object(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    refused(folder, WeightsError, r"config\.json is not .*; copy or download it again")


def test_missing_files(folder: Path):
    (folder / "model.safetensors").unlink()
    refused(folder, FileNotFoundError, "has neither model.safetensors nor pytorch_model.bin")
    (folder / "config.json").unlink()
    refused(
        folder,
        FileNotFoundError,
        "has no config.json or hparams.json; is it the folder of a model?",
    )


def test_missing_shard(folder: Path):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    refused(folder, FileNotFoundError, r"lacks the shards \['model-00002-of-00002.safetensors'\]")
    index.write_text('{"weight_map"')
    refused(folder, WeightsError, r"index\.json is not .*; copy or download it again")


def test_unknown_alias_and_unknown_device(folder: Path):
    with pytest.raises(ValueError, match=r"'gpt2-smal' is not a folder.*did you mean gpt2-small"):
        DemoTransformer.from_pretrained("gpt2-smal")
    with pytest.raises(ValueError, match="unknown device 'warp'"):
        DemoTransformer.from_pretrained(folder, device="warp")


def test_an_unknown_device_is_refused_before_the_file_is_read(folder: Path):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="unknown device 'warp'"):
        DemoTransformer.from_pretrained(folder, device="warp")


# What loading costs.

GROWTH = """
import sys
from pathlib import Path

import torch

from clean_transformer import DemoTransformer


def memory(field):
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024


DemoTransformer.from_pretrained(sys.argv[1], device="cpu")  # imports what loading needs
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before = memory("VmRSS")
model = DemoTransformer.from_pretrained(sys.argv[2], device="cpu")
touched = sum(float(parameter.sum()) for parameter in model.parameters())
size = sum(parameter.nbytes for parameter in model.parameters())
print((memory("VmHWM") - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_loading_needs_little_more_memory_than_the_model(tmp_path: Path, kind: str):
    random_model().save_pretrained(tmp_path / "tiny")
    cfg = Config.gpt2("small", n_layers=6, n_heads=8, d_model=512, d_head=64, d_mlp=2048)
    state = {name: torch.ones(shape) for name, shape in parameter_shapes(cfg).items()}
    state["unembed.b_U"].zero_()
    assert sum(tensor.nbytes for tensor in state.values()) > 150e6
    tensors = HUGGINGFACE.write(cfg, state)
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(cfg)))
    if kind == "pickle":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")

    process = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path / "tiny"), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert 0.95 < float(process.stdout) < 1.3


# State dicts.


def test_from_state_dict_copies_our_own_state():
    model = random_model(b_U=True)
    copied = DemoTransformer.from_state_dict(model.state_dict(), model.cfg)
    assert_equal_states(copied.state_dict(), model.state_dict())
    with torch.no_grad():
        copied.embed.W_E.zero_()
    assert model.embed.W_E.any()


def test_from_state_dict_refuses_a_foreign_one():
    message = r"none of the known formats \(.*\); its first keys are \['encoder.weight'\]"
    with pytest.raises(WeightsError, match=message):
        DemoTransformer.from_state_dict({"encoder.weight": torch.ones(1)})


def test_from_state_dict_names_every_difference():
    state = random_model().state_dict()
    state["blocks.0.mlp.W_in"] = state["blocks.0.mlp.W_in"].T
    state["blocks.0.mlp.gate"] = state.pop("ln_final.b")
    message = re.escape(
        "missing: ln_final.b; unused: blocks.0.mlp.gate; "
        "of the wrong shape: blocks.0.mlp.W_in (20, 12) instead of (12, 20)"
    )
    with pytest.raises(WeightsError, match=message):
        DemoTransformer.from_state_dict(state, TINY)
