"""Mutated files of every format: each gives usable weights, or one error that names the file.

`make fuzz` runs more inputs.
"""

import json
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from clean_transformer.cli import app
from clean_transformer.parity.report.json import to_json
from clean_transformer.text.tokenizer import Tokenizer
from clean_transformer.training import checkpoint
from clean_transformer.training.loop import describe, train
from clean_transformer.training.settings import Training
from clean_transformer.weights import hub
from clean_transformer.weights.formats import tensorflow
from clean_transformer.weights.formats.gguf import write_gguf
from clean_transformer.weights.formats.huggingface import HUGGINGFACE, write_folder
from clean_transformer.weights.formats.nanogpt import NANOGPT
from clean_transformer.weights.load import WEIGHTS, read_pretrained
from clean_transformer.weights.shapes import parameter_shapes

from ..conftest import ROOT
from ..helpers import random_model, random_tokens, tiny, trained, unchecked_types
from ..parity.report.test_terminal import REPORT
from .formats import bundles
from .fuzzing import damages, edits, fuzzed, hostile_tensors, limits, restructured, rewrite_json

CFG = tiny(d_mlp=48)
STATE = random_model(CFG, dtype=torch.float32).state_dict()
ARGS = {"n_layer": 2, "n_head": 3, "n_embd": 12, "block_size": 10, "vocab_size": 31}
CPU = torch.device("cpu")
CHECKSUMMED = ("openai", "pickled", "nanogpt")


def safetensors(folder: Path) -> Path:
    write_folder(folder, CFG, STATE)
    return folder


def pickled(folder: Path, **options: Any) -> Path:
    write_folder(folder, CFG, STATE)
    (folder / "model.safetensors").unlink()
    torch.save(HUGGINGFACE.write(CFG, STATE), folder / "pytorch_model.bin", **options)
    return folder


def legacy(folder: Path) -> Path:
    return pickled(folder, _use_new_zipfile_serialization=False)


def shards(folder: Path) -> Path:
    pickled(folder)
    theirs = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for number, name in enumerate(names):
        torch.save({key: theirs[key] for key in [*theirs][number::2]}, folder / name)
    places = {key: names[number % 2] for number, key in enumerate(theirs)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def nanogpt(folder: Path) -> Path:
    saved = {"model": NANOGPT.write(CFG, STATE), "model_args": ARGS}
    torch.save(saved, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def gguf(folder: Path) -> Path:
    write_gguf(folder / "model.gguf", CFG, STATE)
    return folder / "model.gguf"


def openai(folder: Path) -> Path:
    bundles.write_openai(folder, CFG, STATE)
    return folder


WRITERS = (safetensors, pickled, legacy, shards, nanogpt, gguf, openai)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[Callable[[Path], Path], Path]:
    folders = {write: tmp_path_factory.mktemp(write.__name__) for write in WRITERS}
    return {write: write(folder) for write, folder in folders.items()}


def copied(source: Path) -> Path:
    """A copy of the folder or file `source`, in a folder of its own beside it."""
    folder = source if source.is_dir() else source.parent
    bad = folder.with_name(f"{folder.name} bad")
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(folder, bad)
    return bad if source.is_dir() else bad / source.name


def check(path: Path, read: Callable[[Path], Any]) -> Any:
    """Return what `read(path)` returns, or None if it raises one plain error that names `path`."""
    try:
        with warnings.catch_warnings(), unchecked_types(), limits():
            warnings.simplefilter("ignore")
            return read(path)
    except (ValueError, FileNotFoundError) as refusal:
        message = str(refusal)
    assert str(path if path.is_dir() else path.parent) in message, message
    assert message.isprintable(), message
    assert "alloc" not in message and "Memory" not in message, message  # noqa: PT018
    assert "weights_only" not in message, message
    assert len(message) < 20_000, message[:1000]
    return None


def check_weights(path: Path, exact: bool = False) -> None:
    """Check that `path` is refused, or has finite weights of the right shapes, or exact ones."""
    found = check(path, lambda path: read_pretrained(path, CPU, torch.float32))
    if found is None:
        return
    cfg, state = found
    shapes = parameter_shapes(cfg)
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == shapes
    for key, tensor in state.items():
        assert tensor.isfinite().all(), key
        if exact and cfg.n_heads == CFG.n_heads:
            assert tensor.equal(STATE[key]), key


# Changed bytes.


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@fuzzed
@given(which=st.floats(0, 1, exclude_max=True), damage=damages())
def test_damaged_files(good, write, which: float, damage):
    path = copied(good[write])
    files = [path] if path.is_file() else sorted(path.iterdir())
    damage(files[int(which * len(files))])
    # Only TensorFlow's checksums protect all values; a zip file's can be right for other content.
    check_weights(path, exact=write is openai)


# Changed structures.


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (safetensors, "config.json"),
        (openai, "hparams.json"),
        (shards, "pytorch_model.bin.index.json"),
    ],
)
@fuzzed
@given(data=st.data())
def test_other_json(good, write, name: str, data):
    path = copied(good[write])
    rewrite_json(path / name, lambda fields: data.draw(restructured(fields)))
    check_weights(path)


@fuzzed
@given(data=st.data())
def test_other_headers_of_safetensors(good, data):
    path = copied(good[safetensors])
    raw = (path / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    hostile = ("I32", "BOOL", "F16", "F8_E4M3", [0, 2**63], [0, -4], 2**40, [], {}, None, "\x1b[")
    changed = json.dumps(data.draw(restructured(header, hostile))).encode()
    content = struct.pack("<Q", len(changed)) + changed + raw[8 + size :]
    (path / "model.safetensors").write_bytes(content)
    check_weights(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("write", [pickled, nanogpt], ids=lambda write: write.__name__)
@pytest.mark.filterwarnings("ignore")
@fuzzed
@given(data=st.data())
def test_other_objects_in_pickles(good, write, zipped: bool, data):
    path = copied(good[write])
    file = path if path.is_file() else path / "pytorch_model.bin"
    saved = torch.load(file, weights_only=True)
    hostile = (*hostile_tensors(STATE["embed.W_E"]), 10**9, -1, "\x1b[2J")
    changed = data.draw(restructured(saved, hostile))
    torch.save(changed, file, _use_new_zipfile_serialization=zipped)
    check_weights(path)


@fuzzed
@given(data=st.data())
def test_other_entries_of_tensorflow(good, data):
    """The index of a bundle has other numbers, shapes and names, with right checksums."""
    path = copied(good[openai])
    index = path / "model.ckpt.index"
    entries = dict(tensorflow.read_table(index.read_bytes()))
    key = data.draw(st.sampled_from([*entries]))
    message = tensorflow._decode(entries[key])
    tag = data.draw(st.sampled_from([*message, 8, 16, 18, 24, 32, 40, 53, 58]))
    number = data.draw(st.sampled_from([0, 1, 3, 19, 100, 2**31, 2**63, 2**64 - 1]))
    value = b"\x08" + bundles.varint(number)
    if tag % 8 == 2:
        message[tag] = data.draw(
            st.sampled_from([[], [value], [b"\x12" + bundles.sized(value)] * 5, [b"\xff" * 30]])
        )
    else:
        message[tag] = [number]
    encoded = b""
    for each, values in message.items():
        for item in values:
            if each % 8 == 5:
                content = (item % 2**32).to_bytes(4, "little")
            else:
                content = bundles.sized(item) if each % 8 == 2 else bundles.varint(item)
            encoded += bundles.varint(each) + content
    name = data.draw(st.sampled_from([key, key, key, b"\x1b[2J", b"\xff", b"a" * 5000]))
    entries[name] = encoded
    index.write_bytes(bundles.table(entries))
    check_weights(path)


TENSOR_CHANGES = (
    None,
    lambda tensor: tensor.astype("float16"),
    lambda tensor: tensor.astype("int32"),
    lambda tensor: tensor * float("nan"),
    lambda tensor: tensor[:1],
    lambda tensor: tensor[None, ..., None],
)


@fuzzed
@given(data=st.data())
def test_other_fields_of_gguf(good, data):
    import gguf as package

    path = copied(good[gguf])
    reader = package.GGUFReader(path)
    fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }
    tensors = {tensor.name: tensor.data.copy() for tensor in reader.tensors}
    numbers = (0, 1, 2, 4, 2**31 - 1, -1, 0.5, float("nan"), True)
    hostile = (*numbers, "", "x", "\x1b[2J", [1], ["x"])
    changed = data.draw(restructured(fields, hostile).filter(lambda tree: isinstance(tree, dict)))
    for name in data.draw(st.lists(st.sampled_from([*tensors]), max_size=2, unique=True)):
        change = data.draw(st.sampled_from(TENSOR_CHANGES))
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name])
    architecture = data.draw(st.sampled_from(["gpt2", "gpt2", "llama"]))
    with closing(package.GGUFWriter(path, architecture)) as writer:
        for name, value in changed.items():
            if name and value != []:
                writer.add_key_value(name, value, package.GGUFValueType.get_type(value))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    check_weights(path)


# Tokenizers.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained().save(str(folder / "tokenizer.json"))
    small = {"add_prefix_space": True, "eos_token": {"content": "<X>"}, "pad_token": "<pad>"}
    added = {"270": {"content": "<Y>", "special": True, "lstrip": True}}
    config = small | {"added_tokens_decoder": added, "additional_special_tokens": ["<A>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": 0, "eos_token_id": [0, 1]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    trained().model.save(str(folder))
    return folder


def check_tokenizer(folder: Path) -> None:
    found = check(folder, Tokenizer.from_pretrained)
    if found is not None:
        text = "the Cat\n ß<X>"
        assert found.to_string(found.to_tokens(text, prepend_bos=False)[0]).lstrip() == text


@pytest.mark.parametrize("split", [False, True])
@fuzzed
@given(data=st.data(), damage=damages())
def test_other_tokenizers(tokenizer: Path, split: bool, data, damage):
    path = copied(tokenizer)
    if split:
        (path / "tokenizer.json").unlink()
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    if file.suffix == ".json" and data.draw(st.booleans()):
        rewrite_json(file, lambda fields: data.draw(restructured(fields)))
    else:
        damage(file)
    check_tokenizer(path)


# Answers of the hub, checkpoints of training runs, and reports.

LISTING = {
    "id": "someone/model",
    "siblings": [{"rfilename": name} for name in ("README.md", "config.json", "model.safetensors")],
}


class Session:
    """A session of HTTP requests. Each answer has the same content."""

    def __init__(self, content: bytes):
        self.content = content

    @contextmanager
    def stream(self, *_: object, **__: object) -> Iterator["Session"]:
        yield self

    def iter_bytes(self) -> Iterator[bytes]:
        yield self.content


@fuzzed
@given(data=st.data(), edit=edits())
def test_other_answers_of_the_hub(tmp_path_factory, data, edit):
    content = json.dumps(data.draw(restructured(LISTING)), allow_nan=True).encode()
    if data.draw(st.booleans()):
        content = edit(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.utils.get_session", lambda: Session(content))
        patch.setattr("huggingface_hub.utils.hf_raise_for_status", lambda answer: None)
        patch.setattr(hub, "_cached", lambda repo, wanted: None)
        patch.setattr(hub, "_download", lambda repo, file: Path("cache") / file)
        try:
            with limits():
                assert hub.fetch("someone/model", WEIGHTS) == Path("cache")
        except hub.HubError as error:
            assert "'someone/model'" in str(error)  # noqa: PT017
            assert str(error).isprintable()  # noqa: PT017


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(random_model(CFG), TOKENS, folder, SETTINGS, device="cpu")
    return folder


SETTINGS = Training(steps=1, batch=1)
TOKENS = random_tokens(CFG, batch=1, length=40)[0].numpy()


@fuzzed
@given(data=st.data(), damage=damages())
def test_other_checkpoints(run: Path, data, damage):
    path = copied(run) / "checkpoint.pt"
    model = random_model(CFG)
    about = describe(model, SETTINGS, TOKENS, None)
    if data.draw(st.booleans()):
        hostile = (*hostile_tensors(STATE["embed.W_E"]), 10**9, -1, "\x1b[2J")
        torch.save(data.draw(restructured(torch.load(path, weights_only=True), hostile)), path)
    else:
        damage(path)
    found = check(path, lambda path: checkpoint.read(path.parent, about, model.state_dict(), 1))
    assert found is None or found["step"] == 1


@pytest.mark.parametrize("kind", ["bench", "parity"])
@fuzzed
@given(data=st.data(), damage=damages())
def test_other_reports(tmp_path_factory, kind: str, data, damage):
    folder = tmp_path_factory.mktemp("reports")
    bench = json.loads((ROOT / "benchmarks/results/two_core_amd_avx512.json").read_text())
    report = bench if kind == "bench" else to_json(REPORT)
    before, after = folder / "before.json", folder / "after.json"
    before.write_text(json.dumps(report))
    after.write_text(json.dumps(report))
    if data.draw(st.booleans()):
        rewrite_json(after, lambda fields: data.draw(restructured(fields)))
    else:
        damage(after)
    with limits():
        result = CliRunner().invoke(app, ["compare", str(before), str(after), "--rows"])
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code in (0, 1, 2), result.output
    assert "\x1b" not in result.output
    if result.exit_code == 2:
        [line] = result.stderr.splitlines()
        assert str(after) in line or "reports" in line, line
