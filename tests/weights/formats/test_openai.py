import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.weights.formats.huggingface import HUGGINGFACE
from clean_transformer.weights.formats.openai import OPENAI, config_from_hparams, read_openai
from clean_transformer.weights.formats.tensorflow import DTYPES, read_bundle
from clean_transformer.weights.load import read_state_dict
from clean_transformer.weights.refusals import WeightsError
from clean_transformer.weights.shapes import parameter_shapes

from ...helpers import assert_equal_states, configs, random_model, tiny, unchecked_types
from .bundles import write_bundle, write_openai

WRITTEN = Path(__file__).parent / "data" / "tiny"  # by TensorFlow
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
FILES = ["checkpoint", "hparams.json", DATA, INDEX]
CFG = tiny(d_mlp=48)  # everything that hparams.json says of the one in WRITTEN

# Architectures that hparams.json can say.
sayable = configs(tied_unembed=True, eps=1e-5, initializer_range=0.02).map(
    lambda cfg: replace(cfg, d_mlp=4 * cfg.d_model)
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the folder that TensorFlow wrote."""
    return Path(shutil.copytree(WRITTEN, tmp_path / "124M"))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> DemoTransformer:
    return DemoTransformer.from_pretrained(folder, device="cpu", dtype=dtype)


# What TensorFlow wrote.


def test_names_and_values_are_those_that_tensorflow_wrote():
    cfg, state = read_openai(WRITTEN)
    assert cfg == CFG
    # The script beside the files counts up through the variables in the order of their names.
    values = torch.cat([state[name].flatten() for name in sorted(state)])
    assert torch.equal(values, torch.arange(len(values)) / 1024)
    assert {"model/wte", "model/h1/attn/c_attn/w", "model/h0/ln_1/g", "model/ln_f/b"} < state.keys()


def hugging_faces(name: str) -> str:
    name = name.replace("model/h", "transformer/h/").replace("model/", "transformer/")
    scope, last = name.rsplit("/", 1)
    last = {"g": "weight", "w": "weight", "b": "bias"}.get(last, f"{last}.weight")
    return f"{scope}/{last}".replace("/", ".")


def test_the_weights_are_hugging_faces_but_for_names_and_a_leading_1():
    read = read_bundle(WRITTEN / "model.ckpt")
    theirs = {hugging_faces(name): tensor.squeeze(0) for name, tensor in read.items()}
    assert_equal_states(load(WRITTEN).state_dict(), HUGGINGFACE.read(CFG, theirs))


def test_the_parameters_are_views_of_the_file():
    storages = {
        parameter.untyped_storage().data_ptr()
        for name, parameter in load(WRITTEN).named_parameters()
        if name != "unembed.b_U"
    }
    assert len(storages) == 1


def test_a_config_without_weights_beside_them_does_not_hide_them(folder: Path):
    (folder / "config.json").write_text("{}")
    assert_equal_states(load(folder).state_dict(), load(WRITTEN).state_dict())


# Round trips.


@given(sayable, st.sampled_from([*DTYPES.values()]))
def test_every_bit_and_the_config_are_read(tmp_path_factory, cfg: Config, dtype: torch.dtype):
    folder = tmp_path_factory.mktemp("models")
    model = random_model(cfg, dtype=dtype)
    write_openai(folder / "a", cfg, model.state_dict())
    load(folder / "a", dtype).save_pretrained(folder / "b")
    loaded = load(folder / "b", dtype)
    assert loaded.cfg == cfg
    assert_equal_states(loaded.state_dict(), model.state_dict())


def test_the_published_hparams_are_gpt2_small():
    published = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    assert config_from_hparams(published) == Config.gpt2("small")


@pytest.mark.filterwarnings("ignore:.*assuming 12 heads")
def test_a_state_dict_of_these_names_is_recognized():
    cfg = Config.gpt2("small", n_layers=1, d_vocab=5, n_ctx=3)
    state = {name: torch.ones(shape) for name, shape in parameter_shapes(cfg).items()}
    state["unembed.b_U"].zero_()
    read_cfg, read = read_state_dict(OPENAI.write(cfg, state))
    assert read_cfg == cfg
    assert_equal_states(read, state)
    with pytest.raises(WeightsError, match=r"OpenAI GPT-2 format has no place for unembed\.W_U$"):
        read_state_dict(OPENAI.write(cfg, state), replace(cfg, tied_unembed=False))


# Damage.


@given(st.data())
def test_a_flipped_bit_is_told_by_name(tmp_path_factory, data: st.DataObject):
    folder = Path(shutil.copytree(WRITTEN, tmp_path_factory.mktemp("models") / "124M"))
    file = data.draw(st.sampled_from([INDEX, DATA]))
    content = bytearray((folder / file).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    (folder / file).write_bytes(content)
    named = r"index is not a valid TensorFlow index: "
    if file == DATA:
        ends = torch.tensor([t.nbytes for t in SORTED.values()]).cumsum(0)
        name = [*SORTED][int((ends <= at).sum())]
        named = f"{DATA} is damaged in {name}; copy or download it again"
    refused(folder, WeightsError, named)


SORTED = dict(sorted(read_bundle(WRITTEN / "model.ckpt").items()))


def refused(folder: Path, error: type[Exception], message: str) -> None:
    with unchecked_types(), pytest.raises(error, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("checkpoint", "124M has no file 'checkpoint', which names the weights"),
        ("hparams.json", r"124M has no config\.json or hparams\.json; is it the folder of a model"),
        (INDEX, r"there is no .*124M/model\.ckpt\.index; copy or download it again"),
        (DATA, r"there is no .*124M/model\.ckpt\.data-00000-of-00001; copy or download it again"),
    ],
)
def test_a_missing_file(folder: Path, file: str, message: str):
    (folder / file).unlink()
    refused(folder, FileNotFoundError, message)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0, 0.3])
def test_a_truncated_file(folder: Path, file: str, share: float):
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(share * len(content))])
    refused(folder, WeightsError, f"{re.escape(file)} .*copy or download it again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_layer": None},
            r"has the fields \['n_vocab', .*\]; expected \['n_vocab', .* 'n_layer'\]",
        ),
        ({"n_inner": 48}, r"'n_inner'\]; expected \['n_vocab', .* 'n_layer'\]"),
        ({"n_ctx": "10"}, r"says {'n_ctx': '10'}; .* positive integers"),
        ({"n_ctx": True, "n_head": 0}, r"says {'n_ctx': True, 'n_head': 0}; .* positive integers"),
        (
            {"n_ctx": "b" * 10_000, "n_head": [[]] * 1000},
            r"says {'n_ctx': 'b{12}\.\.\.b{13}', .{20,60}",
        ),
        ({"a" * 10_000: 1, "b" * 10_000: 1}, r"has the fields .{50,150}; expected"),
        ({"n_head": 5}, "n_embd 12 is not a multiple of 5 heads"),
        ({"n_ctx": 11}, r"of the wrong shape: model/wpe \(10, 12\) instead of \(11, 12\)$"),
        ({"n_layer": 3}, r"missing: model/h2/ln_1/g, "),
        ({"n_layer": 1}, r"unused: model/h1/attn/c_attn/b, "),
    ],
)
def test_hparams_of_another_model(folder: Path, changes: dict, message: str):
    hparams = json.loads((folder / "hparams.json").read_text()) | changes
    said = {field: value for field, value in hparams.items() if value is not None}
    (folder / "hparams.json").write_text(json.dumps(said))
    refused(folder, WeightsError, message)


def test_tensors_of_another_model(folder: Path):
    state = dict(SORTED)
    state["model/h1/attn/c_attn/w"] = state["model/h1/attn/c_attn/w"].squeeze(0)
    state["model/wte/Adam"] = state["model/wte"]
    del state["model/ln_f/g"]
    write_bundle(folder / "model.ckpt", state)
    refused(
        folder,
        WeightsError,
        "missing: model/ln_f/g; unused: model/wte/Adam; "
        r"of the wrong shape: model/h1/attn/c_attn/w \(12, 36\) instead of \(1, 12, 36\)$",
    )


@pytest.mark.parametrize(
    "path", ["model-500", "/home/me/models/124M/model-500", r"C:\\a\\model-500"]
)
def test_the_bundle_that_checkpoint_names(folder: Path, path: str):
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{path}"\n')
    refused(folder, FileNotFoundError, r"there is no .*model-500\.index")
    for file in (INDEX, DATA):
        (folder / file).rename(folder / file.replace("model.ckpt", "model-500"))
    assert_equal_states(load(folder).state_dict(), load(WRITTEN).state_dict())
