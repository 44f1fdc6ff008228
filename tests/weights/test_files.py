"""Files as people have them, and files that must not be believed."""

import json
import re
import struct
import tarfile
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.weights.formats.huggingface import HUGGINGFACE, write_folder
from clean_transformer.weights.formats.nanogpt import NANOGPT
from clean_transformer.weights.load import FORMATS, read_state_dict
from clean_transformer.weights.refusals import WeightsError

from ..helpers import assert_equal_states, needs_torch, random_model, random_state, tiny

CFG = tiny(d_mlp=48)
SMALL = Config.gpt2("small", n_layers=1, d_vocab=64, n_ctx=9, tied_unembed=False)
WTE = "transformer.wte.weight"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_model(CFG, dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def theirs(state) -> dict[str, Tensor]:
    return HUGGINGFACE.write(CFG, state)


def load(path: Path) -> dict[str, Tensor]:
    return DemoTransformer.from_pretrained(path, device="cpu").state_dict()


def refused(path: Path, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert "weights_only=False" not in str(caught.value)


def put(folder: Path, state, theirs, name: str = "pytorch_model.bin", **options) -> Path:
    """A folder in Hugging Face's format whose weights are `theirs`, pickled."""
    write_folder(folder, CFG, state)
    (folder / "model.safetensors").unlink()
    torch.save(theirs, folder / name, **options)
    return folder


# Files as people have them.


def test_a_bin_from_before_torch_1_6(tmp_path: Path, state, theirs):
    folder = put(tmp_path, state, theirs, _use_new_zipfile_serialization=False)
    assert_equal_states(load(folder), state)


@pytest.mark.filterwarnings("ignore:.*assuming GPT-2's eps")
def test_a_pt_from_before_torch_1_6(tmp_path: Path):
    state = random_model(SMALL, dtype=torch.float32).state_dict()
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert_equal_states(load(tmp_path / "model.pt"), state)


def test_shards_of_a_bin(tmp_path: Path, state, theirs):
    put(tmp_path, state, {})
    (tmp_path / "pytorch_model.bin").unlink()
    places = {}
    for shard, keys in enumerate(([*theirs][::2], [*theirs][1::2]), start=1):
        name = f"pytorch_model-0000{shard}-of-00002.bin"
        torch.save({key: theirs[key] for key in keys}, tmp_path / name)
        places |= dict.fromkeys(keys, name)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert_equal_states(load(tmp_path), state)

    torch.save(theirs, tmp_path / "pytorch_model-00002-of-00002.bin")
    refused(tmp_path, r"00002-of-00002\.bin has transformer.*, which another shard has, too")
    for outside in ("../x.bin", "/etc/passwd", "a/b", "", 5):
        index.write_text(json.dumps({"weight_map": {WTE: outside}}))
        refused(tmp_path, r"index\.json lists .*; it must list files in its own folder")


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "_forward_module.",
        "model.",
        "model._orig_mod.module.",
        "module.model.",
        "_module.",
        "net.gpt2.",
    ],
)
@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_prefixes_are_stripped_in_every_format(known, prefix: str):
    state = random_state(known, CFG)
    prefixed = {prefix + key: tensor for key, tensor in known.write(CFG, state).items()}
    assert_equal_states(read_state_dict(prefixed, CFG)[1], state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_forward_module.", "_module."])
@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_prefixes_of_single_parts_are_stripped(known, prefix: str):
    """As of a block that is compiled, or of a model whose unembedding alone is not wrapped."""
    state = random_state(known, CFG)
    theirs = known.write(CFG, state)
    inside = {re.sub(r"\.(?=\D+$)", f".{prefix}", key): x for key, x in theirs.items()}
    some = {prefix * (number % 2) + key: x for number, (key, x) in enumerate(theirs.items())}
    for prefixed in (inside, some):
        assert_equal_states(read_state_dict(prefixed, CFG)[1], state)


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "model."])
def test_prefixes_in_a_folder(tmp_path: Path, state, theirs, prefix: str):
    prefixed = {(key if key == WTE else prefix + key): x for key, x in theirs.items()}
    assert_equal_states(load(put(tmp_path, state, prefixed)), state)


def test_two_keys_that_differ_in_their_prefix(theirs):
    with pytest.raises(WeightsError, match=r"has transformer\.wte\.weight twice, with different"):
        read_state_dict(theirs | {f"module.{WTE}": theirs[WTE]}, CFG)


@pytest.mark.filterwarnings("ignore:.*assuming GPT-2's eps")
@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model_state_dict", "model.pt"),
        ("state_dict", "model.ckpt"),
        ("model", "model.pth"),
        ("module", "model.pt"),
        ("net", "model.pt"),
    ],
)
def test_the_usual_wrappers(tmp_path: Path, key: str, name: str):
    model = random_model(SMALL, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    saved = {key: model.state_dict(), "optimizer": optimizer, "epoch": 3}
    torch.save(saved, tmp_path / name)
    assert_equal_states(load(tmp_path / name), model.state_dict())


@pytest.mark.filterwarnings("ignore:.*assuming GPT-2's eps")
@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model"])
def test_a_usual_wrapper_counts_beside_another_state_dict(tmp_path: Path, key: str):
    models = (random_model(SMALL, dtype=torch.float32, seed=seed) for seed in (0, 1))
    state, other = (model.state_dict() for model in models)
    torch.save({"ema": other, key: state}, tmp_path / "model.pt")
    assert_equal_states(load(tmp_path / "model.pt"), state)


def test_two_wrappers_are_no_state_dict(tmp_path: Path, theirs):
    torch.save({"net": theirs, "ema": theirs}, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", r"is not a state dict: \['net', 'ema'\] are not tensors; load")


def test_a_wrapper_in_a_folder(tmp_path: Path, state, theirs):
    assert_equal_states(load(put(tmp_path, state, {"state_dict": theirs})), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_is_named(tmp_path: Path, zipped: bool):
    file = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2), file, _use_new_zipfile_serialization=zipped)
    refused(file, r"contains a whole Python object of the class torch\.nn.*Linear.*state_dict\(\)")


@needs_torch("2.6", "PyTorch does not say that a file is that old")
def test_a_file_of_the_first_torch_is_named(tmp_path: Path):
    with tarfile.open(tmp_path / "model.pt", "w") as old:
        old.addfile(tarfile.TarInfo("storages"))
    refused(tmp_path / "model.pt", r"was written by PyTorch 0\.1; load it there")


def test_objects_beside_a_state_dict_are_named(tmp_path: Path, theirs):
    torch.save({"model": theirs, "args": Namespace(lr=1)}, tmp_path / "model.pt")
    message = r"calls argparse\.Namespace; if the file is yours, save only the state dict: torch\.s"
    refused(tmp_path / "model.pt", message)


class Runs:
    def __reduce__(self):
        return (print, ("this was run",))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_named_and_not_run(tmp_path: Path, capsys, zipped: bool):
    torch.save({WTE: Runs()}, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "model.pt", "wants to run code when it is read: it calls .*print")
    assert capsys.readouterr().out == ""


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save({}, tmp_path / "model.pt")

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)  # root may read every file
    refused(tmp_path / "model.pt", r"may not be read \(Permission denied\)")


@pytest.mark.parametrize(
    ("activation", "variant"),
    [
        ("gelu", "variants.ExactGeluMLP"),
        ("gelu_python", "variants.ExactGeluMLP"),
        ("relu", "variants.ReluMLP"),
        ("silu", "a class of yours"),
    ],
)
def test_another_activation_names_the_variant(tmp_path: Path, state, activation: str, variant: str):
    write_folder(tmp_path, CFG, state)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("gelu_new", activation))
    refused(tmp_path, rf"activation_function='{activation}'.*swap\(.*, {variant}\)")


# Wrong weights.


def test_long_names_from_a_file_are_shortened(tmp_path: Path, state, theirs):
    named = {letter * 10_000: theirs[WTE] for letter in "abc"}
    refused(put(tmp_path, state, theirs | named), r"unused: (a{500}….?.?b{500}….?.?c{500}…)$")


def test_control_characters_from_a_file_are_escaped(tmp_path: Path, state, theirs):
    strange = theirs | {"\x1b[31mred": theirs[WTE]}
    refused(put(tmp_path, state, strange), r"unused: .*\\x1b\[31mred")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda t: t.int(), f"{WTE} is torch.int32"),
        (lambda t: t.bool(), f"{WTE} is torch.bool"),
        (lambda t: t.to(torch.complex64), f"{WTE} is torch.complex64"),
        (lambda t: t.to_sparse(), f"{WTE} is torch.float32 in the layout torch.sparse_coo"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), f"{WTE} is quantized"),
        (lambda t: t[:1, :1].clone().expand(t.shape), f"{WTE} claims 372 elements, more than the"),
        (lambda t: t * float("nan"), f"{WTE} contains NaN or infinity; to load it anyway"),
        (lambda t: t.index_fill(0, torch.tensor(3), float("-inf")), f"{WTE} contains NaN or inf"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(quantiz|TypedStorage|Sparse)")
def test_tensors_that_are_no_weights(tmp_path: Path, state, theirs, wrong, message: str):
    refused(put(tmp_path, state, theirs | {WTE: wrong(theirs[WTE])}), message)


def test_large_finite_weights_are_finite(tmp_path: Path, state, theirs):
    large = theirs | {WTE: torch.full_like(theirs[WTE], 3e38)}
    assert load(put(tmp_path, state, large))["embed.W_E"].isfinite().all()


def test_nan_in_tied_weights_is_nan_and_not_another_unembedding(tmp_path: Path, state, theirs):
    nan = theirs[WTE].index_fill(0, torch.tensor(3), float("nan"))
    both = theirs | {WTE: nan, "lm_head.weight": nan.clone()}
    refused(put(tmp_path, state, both), f"{WTE} contains NaN or infinity")
    assert read_state_dict(both, CFG)[1]["embed.W_E"].isnan().any()


# Sizes before work.


@pytest.mark.parametrize("layers", [10**9, 10**30])
def test_a_config_that_claims_many_layers(tmp_path: Path, state, layers: int):
    write_folder(tmp_path, CFG, state)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"n_layer": 2', f'"n_layer": {layers}'))
    refused(tmp_path, f"has {layers} layers, but this Hugging Face GPT-2 state dict has only")


@pytest.mark.filterwarnings("ignore:nanoGPT has computed the exact GELU")
def test_model_args_that_claim_many_layers(tmp_path: Path, state):
    args = {"n_layer": 10**9, "n_head": 3, "n_embd": 12, "block_size": 10, "vocab_size": 31}
    saved = {"model": NANOGPT.write(CFG, state), "model_args": args}
    torch.save(saved, tmp_path / "ckpt.pt")
    refused(tmp_path / "ckpt.pt", "has 1000000000 layers, but")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, r"config\.json is nested too deeply"),
        ('{"n_layer": 1, "n_layer": 2}', r"the key 'n_layer' occurs twice"),
        (
            '{"n_layer": 1, "n_embd": "12", "n_head": "3"}',
            "positive integers, not '12' and '3'",
        ),
        (
            '{"n_layer": 1, "n_embd": 1e400, "n_head": 3}',
            "positive integers, not inf and 3",
        ),
        ('{"n_embd": 12, "n_head": 3, "n_layer": [], "vocab_size": 3, "n_ctx": 1}', "n_layers"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, state, content: str, message: str):
    write_folder(tmp_path, CFG, state)
    (tmp_path / "config.json").write_text(content)
    refused(tmp_path, message)


def test_a_key_twice_in_a_header(tmp_path: Path, state):
    write_folder(tmp_path, CFG, state)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + size].rstrip()
    entry = json.dumps({WTE: json.loads(header)[WTE]})[1:-1].encode()
    header = header[:-1] + b"," + entry + b"}"
    file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + size :])
    refused(tmp_path, r"model\.safetensors is (not JSON|damaged) \(.*twice|duplicate")


# Damage.


def rewrite(file: Path, change) -> None:
    """Write the zip file again, with `change(name, content)` in the place of each content."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def test_a_record_that_is_cut(tmp_path: Path, state, theirs):
    folder = put(tmp_path, state, theirs)
    rewrite(folder / "pytorch_model.bin", lambda name, c: c[:4] if "/data/0" in name else c)
    refused(folder, r"pytorch_model\.bin is damaged: the data of .* is cut off")


def test_a_record_without_its_checksum(tmp_path: Path, state, theirs):
    file = put(tmp_path, state, theirs) / "pytorch_model.bin"
    raw = bytearray(file.read_bytes())
    place = raw.index(theirs[WTE].numpy().tobytes())
    raw[place + 7] ^= 64
    file.write_bytes(raw)
    refused(tmp_path, r"pytorch_model\.bin is damaged in its record .*/data/")
