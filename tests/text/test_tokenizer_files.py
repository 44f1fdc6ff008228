"""The files of a tokenizer. transformers, which reads the same files, is the oracle."""

import json
import warnings
from pathlib import Path

import gguf
import pytest
import tokenizers
import torch
from tokenizers import models, normalizers

from clean_transformer.model import DemoTransformer
from clean_transformer.text.tokenizer import Tokenizer
from clean_transformer.text.tokenizer_files import END_OF_TEXT

from ..helpers import random_model, tiny, trained

N = 270  # the size of the vocabulary of `trained`
TEXTS = [
    "",
    "<speaker1> the cat<speaker1>",
    "the cat <X>  sat\n<X>",
    f"a{END_OF_TEXT}b",
    " <A><pad> <B>",
]
SPEAKERS = {"<speaker1>": N, "<speaker2>": N + 1}
LEFT = {"content": "<X>", "lstrip": True, "rstrip": False, "normalized": True, "single_word": False}
RIGHT = LEFT | {"lstrip": False, "rstrip": True, "normalized": False, "special": True}
SPEAKER = LEFT | {"content": "<speaker1>", "lstrip": False, "special": False}

FOLDERS = {
    "plain": {},
    "added tokens": {"added_tokens": SPEAKERS},
    "special map": {
        "added_tokens": SPEAKERS,
        "special_tokens_map": {"bos_token": "<speaker1>", "eos_token": LEFT},
    },
    "new special": {"tokenizer_config": {"pad_token": "<pad>", "eos_token": "<X>"}},
    "extra": {"tokenizer_config": {"additional_special_tokens": ["<A>", "<B>"]}},
    "prefix": {"tokenizer_config": {"add_prefix_space": True}},
    "padding": {"tokenizer_config": {"pad_token": "<pad>", "padding_side": "left"}},
    "padding in the map": {"special_tokens_map": {"pad_token": "<pad>", "eos_token": "<X>"}},
    "begin and end": {
        "tokenizer_config": {"add_bos_token": True, "add_eos_token": True, "eos_token": "<X>"}
    },
    "decoder": {
        "tokenizer_config": {
            "add_prefix_space": True,
            "added_tokens_decoder": {str(N + 1): RIGHT, str(N): SPEAKER},
            "eos_token": "<X>",
        },
        "added_tokens": {"<ignored>": N},
        "special_tokens_map": {"bos_token": "<ignored>"},
    },
}


def put(folder: Path, **files) -> Path:
    trained().model.save(str(folder))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_the_ids_are_those_of_transformers(tmp_path: Path, files):
    # Older versions need protobuf to read these files.
    transformers = pytest.importorskip("transformers", minversion="5.24")
    put(tmp_path, **files)
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ours.encode(text) == ids
        assert ours.to_string(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.to_tokens(text, prepend_bos=False).tolist() == [ids]
    assert_pads_alike(ours, theirs)
    assert ours.vocab == theirs.get_vocab()
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


def assert_pads_alike(ours: Tokenizer, theirs) -> None:
    if theirs.pad_token is not None:
        assert ours(TEXTS, padding=True) == dict(theirs(TEXTS, padding=True))
        ids = theirs(TEXTS, padding=True, add_special_tokens=False)["input_ids"]
        assert ours.to_tokens(TEXTS, prepend_bos=False).tolist() == ids
        assert (ours.pad_token, ours.padding_side) == (theirs.pad_token, theirs.padding_side)


def test_settings_count_for_a_tokenizer_json_too(tmp_path: Path):
    trained().save(str(tmp_path / "tokenizer.json"))
    config = {"add_prefix_space": True, "eos_token": "<X>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.to_str_tokens("the<X>") == [END_OF_TEXT, " the", "<X>"]
    assert tokenizer.eos_token_id == N


@pytest.mark.parametrize(
    ("generation", "config", "bos", "stop"),
    [
        ({}, {"bos_token_id": 3, "eos_token_id": 4}, 3, [4]),
        ({"bos_token_id": 5, "eos_token_id": [6, 7]}, {"bos_token_id": 3}, 5, [6, 7]),
        ({}, {"bos_token_id": 50256, "eos_token_id": 50256}, 0, [0]),  # beyond the vocabulary
        ({}, {"bos_token_id": None, "eos_token_id": "4"}, 0, [0]),
    ],
)
def test_the_models_own_ids(tmp_path: Path, generation, config, bos: int, stop: list[int]):
    transformers = pytest.importorskip("transformers")
    put(tmp_path, config=config, **({"generation_config": generation} if generation else {}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.bos_token_id == bos
    assert tokenizer.stop_tokens == stop
    assert tokenizer.eos_token_id == stop[0]
    assert tokenizer.to_tokens("").tolist() == [[bos]]
    if generation:
        theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (bos, stop)


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "config"])
@pytest.mark.parametrize("content", ["[" * 100_000, "[1]", "{", "\udcff", '{"a": 1, "a": 2}'])
def test_malformed_settings(tmp_path: Path, name: str, content: str):
    file = put(tmp_path) / f"{name}.json"
    file.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"{name}\.json is (not|nested too)"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"added_tokens": {"<X>": []}},
        {"special_tokens_map": {"bos_token": {}}},
        {"tokenizer_config": {"eos_token": {"content": None}, "added_tokens_decoder": {}}},
        {"tokenizer_config": {"eos_token": {"content": ""}, "added_tokens_decoder": {}}},
        {"tokenizer_config": {"bos_token": 5}},
        {"tokenizer_config": {"additional_special_tokens": [None]}},
        {"tokenizer_config": {"add_prefix_space": "true"}},
        {"tokenizer_config": {"add_bos_token": 1}},
        {"tokenizer_config": {"padding_side": "top"}},
        {"tokenizer_config": {"split_special_tokens": True}},
    ],
)
def test_settings_of_another_shape(tmp_path: Path, wrong):
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.from_pretrained(put(tmp_path, **wrong))


# Ids without a token.


def test_an_id_beyond_the_vocabulary_is_a_placeholder_and_said_once():
    tokenizer = Tokenizer(trained())
    ids = [*tokenizer.encode(" the cat"), 299, 50300]
    with pytest.warns(UserWarning, match=r"2 of the token ids have no text, such as 299; .*to 269"):
        assert tokenizer.to_string(ids) == " the cat\ufffd\ufffd"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.to_string(torch.tensor([ids])) == [" the cat\ufffd\ufffd"]
        assert tokenizer.to_str_tokens(ids) == [" the", " cat", "\ufffd", "\ufffd"]


# Tokenizers that lose text.


def lossy(change) -> tokenizers.Tokenizer:
    backend = trained()
    change(backend)
    return backend


def lowercase(backend: tokenizers.Tokenizer) -> None:
    backend.normalizer = normalizers.Lowercase()


def compose(backend: tokenizers.Tokenizer) -> None:
    backend.normalizer = normalizers.NFC()


def drop(backend: tokenizers.Tokenizer) -> None:
    backend.model.dropout = 0.5


def word_level(backend: tokenizers.Tokenizer) -> None:
    backend.model = models.WordLevel(backend.get_vocab(), unk_token="a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lowercase, "changes the text 'Hello"),
        (compose, "changes the text 'e"),
        (drop, "BPE dropout"),
        (word_level, "a WordLevel tokenizer loses text"),
    ],
)
def test_a_tokenizer_that_loses_text(change, message: str):
    with pytest.raises(ValueError, match=message):
        Tokenizer(lossy(change))


def test_two_tokens_with_one_id(tmp_path: Path):
    vocab = json.loads((put(tmp_path) / "vocab.json").read_text(encoding="utf-8"))
    vocab["a"] = vocab["b"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match="two tokens of the vocabulary have the same id"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_panic_of_rust_code_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class PanicException(BaseException):
        pass

    class Panics:
        @staticmethod
        def from_file(*_):
            raise PanicException("called `Option::unwrap()` on a `None` value")

    put(tmp_path)
    monkeypatch.setattr(models, "BPE", Panics)
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


# The tokenizer in a GGUF file.


def write_gguf(file: Path, *, merges: bool = True, eos: int = 5) -> Path:
    backend = trained()
    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    pairs = json.loads(backend.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == END_OF_TEXT else 1 for token in tokens])
    if merges:
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(eos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def test_a_gguf_file_has_its_own_tokenizer(tmp_path: Path):
    read, expected = (
        Tokenizer.from_pretrained(write_gguf(tmp_path / "a.gguf")),
        Tokenizer(trained()),
    )
    for text in TEXTS:
        assert read.to_tokens(text).tolist() == expected.to_tokens(text).tolist()
    assert (read.bos_token_id, read.stop_tokens) == (0, [5])


def test_an_id_outside_of_the_vocabulary_of_a_gguf_file_does_not_count(tmp_path: Path):
    read = Tokenizer.from_pretrained(write_gguf(tmp_path / "a.gguf", eos=50256))
    expected = Tokenizer(trained())
    assert (read.stop_tokens, read.pad_token) == (expected.stop_tokens, expected.pad_token)


def test_a_gguf_file_without_a_tokenizer(tmp_path: Path):
    message = r"a\.gguf holds no tokenizer of GPT-2; name another one with --tokenizer"
    with pytest.raises(FileNotFoundError, match=message):
        Tokenizer.from_pretrained(write_gguf(tmp_path / "a.gguf", merges=False))


# The files that a tokenizer writes.


def saved_with(folder: Path, tokenizer: Tokenizer) -> Path:
    model = random_model(tiny(d_vocab=N + 9))
    model.tokenizer = tokenizer
    model.save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_a_saved_model_has_its_tokenizer_for_us_and_for_transformers(tmp_path: Path, files):
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.from_pretrained(put(tmp_path, **files))
    folder = saved_with(tmp_path, ours)
    again = DemoTransformer.from_pretrained(folder, device="cpu").tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (again.bos_token_id, again.stop_tokens) == (ours.bos_token_id, ours.stop_tokens)
    assert again.vocab == ours.vocab
    for text in TEXTS:
        ids = ours.encode(text)
        assert again.encode(text) == theirs(text)["input_ids"] == ids
    assert theirs.bos_token_id == ours.bos_token_id
    assert_pads_alike(ours, theirs)
    assert (again.pad_token_id, again.padding_side) == (ours.pad_token_id, ours.padding_side)


def test_a_models_own_ids_are_saved(tmp_path: Path):
    folder = saved_with(tmp_path, Tokenizer(trained(), bos_token_id=3, stop_tokens=[5, 7]))
    again = DemoTransformer.from_pretrained(folder, device="cpu").tokenizer
    assert (again.bos_token_id, again.stop_tokens) == (3, [5, 7])


def test_a_model_whose_tokenizer_cannot_be_had_is_saved_without_it(tmp_path: Path):
    model = random_model()
    model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none/tokenizer.json").exists()
    model.source = put(tmp_path, tokenizer_config=[])
    with pytest.warns(UserWarning, match="saved without its tokenizer: .* is not a JSON object"):
        model.save_pretrained(tmp_path / "none")
    model.source = tmp_path / "none"  # a folder without a tokenizer, which is not worth a word
    model.save_pretrained(tmp_path / "none")
