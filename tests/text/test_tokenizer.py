import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import models, processors

from clean_transformer.text.symbols import visible
from clean_transformer.text.tokenizer import END_OF_TEXT, Tokenizer

from ..helpers import GPT2, needs_gpt2, trained, unchecked_types

with_transcripts = needs_gpt2("transcripts.json")

TEXTS = [
    "",
    " ",
    "Hello, world",
    "I'll say it's   spaced\n\n\tout  ",
    "naïve façade – 日本語 – 🤗🏳️‍🌈 – Ελλάδα – עברית",
    "e\u0301 \u200b\ufeff\x00\x7f\ufffd",
    "def f(x):\n    return x ** 2  # 1234+5678",
    "one<|endoftext|>two <|endoftext|>",
    "<|endoftext|",
]


def write(backend: tokenizers.Tokenizer, folder: Path, *names: str) -> Path:
    """The tokenizer's files under those names: one tokenizer.json, or vocabulary and merges."""
    if names == ("tokenizer.json",):
        backend.save(str(folder / "tokenizer.json"))
    else:
        for written, name in zip(backend.model.save(str(folder)), names, strict=True):
            Path(written).rename(folder / name)
    return folder


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer(trained())


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.from_pretrained(GPT2)


# What GPT-2's tokenizer is known to give, and the same on the tiny one.


def transcripts(kind: str) -> list:
    if not (GPT2 / "transcripts.json").exists():
        return []
    return json.loads((GPT2 / "transcripts.json").read_text(encoding="utf-8"))["tokenizer"][kind]


@with_transcripts
@pytest.mark.parametrize(("text", "ids"), transcripts("encode"))
def test_encode_transcripts(gpt2, text, ids):
    assert gpt2.to_tokens(text, prepend_bos=False).tolist() == [ids]


@with_transcripts
@pytest.mark.parametrize(("ids", "text"), transcripts("decode"))
def test_decode_transcripts(gpt2, ids, text):
    assert gpt2.to_string(ids) == text


@with_transcripts
@pytest.mark.parametrize(("text", "str_tokens"), transcripts("to_str_tokens"))
def test_to_str_tokens_transcripts(gpt2, text, str_tokens):
    assert gpt2.to_str_tokens(text) == str_tokens


@with_transcripts
@pytest.mark.parametrize(("text", "prepend_bos", "ids"), transcripts("to_tokens"))
def test_to_tokens_transcripts(gpt2, text, prepend_bos, ids):
    assert gpt2.to_tokens(text, prepend_bos=prepend_bos).tolist() == [ids]


@with_transcripts
def test_the_vocabulary_is_that_of_the_transcripts(gpt2):
    first, last = transcripts("vocab_first"), transcripts("vocab_last")
    vocab = [gpt2.backend.id_to_token(token) for token in range(gpt2.d_vocab)]
    assert (vocab[: len(first)], vocab[-len(last) :]) == (first, last)
    assert gpt2.d_vocab == 50257
    assert gpt2.bos_token_id == gpt2.eos_token_id == 50256


@with_transcripts
def test_openais_files_give_the_same_tokenizer(gpt2, tmp_path):
    # The same two files, under other names; OpenAI's JSON has no letter outside ASCII.
    vocab = json.loads((GPT2 / "vocab.json").read_text(encoding="utf-8"))
    (tmp_path / "encoder.json").write_text(json.dumps(vocab), encoding="ascii")
    shutil.copy(GPT2 / "merges.txt", tmp_path / "vocab.bpe")
    openais = Tokenizer.from_pretrained(tmp_path)
    assert openais.backend.get_vocab() == gpt2.backend.get_vocab()
    for text, ids in transcripts("encode"):
        assert openais.to_tokens(text, prepend_bos=False).tolist() == [ids]


def test_tiny_tokenizer(tiny):
    end = tiny.bos_token_id
    assert tiny.eos_token_id == end == tiny.backend.token_to_id(END_OF_TEXT)
    assert tiny.d_vocab == tiny.backend.get_vocab_size() == 270
    assert tiny.to_tokens(END_OF_TEXT, prepend_bos=False).tolist() == [[end]]
    assert tiny.to_string([end]) == END_OF_TEXT
    words = [" the", " cat", " sat"]
    ids = [tiny.backend.token_to_id(word.replace(" ", "Ġ")) for word in words]
    assert tiny.to_tokens("".join(words)).tolist() == [[end, *ids]]
    assert tiny.to_tokens("".join(words), prepend_bos=False).tolist() == [ids]
    assert tiny.to_str_tokens("".join(words)) == [END_OF_TEXT, *words]
    assert tiny.to_str_tokens("".join(words), prepend_bos=False) == words


@with_transcripts
@pytest.mark.parametrize("text", TEXTS)
def test_equal_to_transformers(gpt2, reference, text):
    ids = reference(text)["input_ids"]
    assert gpt2.to_tokens(text, prepend_bos=False).tolist() == [ids]
    assert gpt2.to_string(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)
    each = [reference.decode([token], clean_up_tokenization_spaces=False) for token in ids]
    assert gpt2.to_str_tokens(text, prepend_bos=False) == each


@pytest.fixture(scope="module")
def reference():
    # Older versions need protobuf to read these files.
    transformers = pytest.importorskip("transformers", minversion="5.24")
    return transformers.GPT2TokenizerFast.from_pretrained(GPT2)


# Text to tokens and back.


@example(text="".join(TEXTS))
@example(text="\x00\x7f\x80\xff\u0100\u0120\u010a")  # in a vocabulary, Ġ and Ċ mean bytes
@given(text=st.text())
def test_every_text_survives_the_round_trip(tiny, text):
    assert tiny.to_string(tiny.to_tokens(text, prepend_bos=False)[0]) == text
    assert tiny.to_string(tiny.to_tokens(text)) == [END_OF_TEXT + text]


@pytest.mark.parametrize("text", TEXTS)
def test_special_text_is_one_token_wherever_it_stands(tiny, text):
    ids = tiny.to_tokens(text, prepend_bos=False)[0].tolist()
    assert ids.count(tiny.eos_token_id) == text.count(END_OF_TEXT)


def test_empty_text(tiny):
    assert tiny.to_tokens("").tolist() == [[tiny.bos_token_id]]
    for empty, shape in [("", (1, 0)), ([], (0, 0)), (["", ""], (2, 0))]:
        tokens = tiny.to_tokens(empty, prepend_bos=False)
        assert (tokens.shape, tokens.dtype) == (shape, torch.int64)
    assert tiny.to_str_tokens("", prepend_bos=False) == tiny.to_str_tokens([]) == []
    assert tiny.to_string([]) == ""
    assert tiny.to_string(torch.empty(2, 0, dtype=torch.int64)) == ["", ""]


def test_a_batch_is_filled_up_on_the_chosen_side(tiny):
    end, cat = tiny.eos_token_id, tiny.backend.token_to_id("Ġcat")
    texts = [" cat", " cat cat cat"]
    assert tiny.to_tokens(texts).tolist() == [[end, cat, end, end], [end, cat, cat, cat]]
    left = tiny.to_tokens(texts, padding_side="left")
    assert left.tolist() == [[end, end, end, cat], [end, cat, cat, cat]]
    bare = tiny.to_tokens(texts, prepend_bos=False)
    assert bare.tolist() == [[cat, end, end], [cat, cat, cat]]


def test_part_of_a_character_shows_as_a_replacement(tiny):
    assert tiny.to_str_tokens("é", prepend_bos=False) == ["�", "�"]
    assert tiny.to_string(tiny.to_tokens("é", prepend_bos=False)) == ["é"]


def test_tokens_come_as_tensors_or_lists(tiny):
    ids = tiny.to_tokens(" the cat", prepend_bos=False)
    for row in (ids[0], ids[0].tolist(), ids[0].int()):
        assert tiny.to_string(row) == " the cat"
        assert tiny.to_str_tokens(row) == [" the", " cat"]
    assert tiny.to_str_tokens(ids) == [" the", " cat"]
    assert tiny.to_string(ids[0, 1]) == " cat"
    assert tiny.to_string(ids.repeat(2, 1).tolist()) == [" the cat", " the cat"]


def test_decoding_as_in_transformers(tiny):
    ids = tiny.to_tokens(" the cat")[0]
    rows = [ids, ids[:2]]
    texts = ["<|endoftext|> the cat", "<|endoftext|> the"]
    assert tiny.decode(rows) == tiny.batch_decode([row.tolist() for row in rows]) == texts
    assert tiny.batch_decode(ids) == texts[:1]
    assert tiny.decode(ids) == tiny.to_string(ids) == texts[0]
    assert tiny.batch_decode(rows, skip_special_tokens=True) == [" the cat", " the"]
    assert tiny.batch_decode([]) == []
    with pytest.raises(ValueError, match=r"each row must have the shape \[pos\]"):
        tiny.batch_decode([ids[None]])
    assert tiny.decode(ids[None], skip_special_tokens=True) == [" the cat"]


# What cannot be done. Called through `__wrapped__`, where the tests' own check of types is not.


@pytest.mark.parametrize(
    ("method", "wrong", "error", "message"),
    [
        ("to_tokens", 5, TypeError, "takes a text or a list of texts, not 5"),
        ("to_tokens", ["a", None], TypeError, "takes a text or a list of texts, not None"),
        ("to_tokens", "\ud800", ValueError, "lone surrogate"),
        ("to_string", "text", TypeError, "equally long lists of ids, not 'text'"),
        ("to_string", ["text"], TypeError, r"equally long lists of ids, not \['text'\]"),
        ("to_string", [[1], [2, 3]], TypeError, "equally long lists"),
        ("to_string", None, TypeError, "equally long lists of ids, not None"),
        ("to_string", [1.5], TypeError, "token ids must be integers, not torch.float32"),
        ("to_string", [True], TypeError, "token ids must be integers, not torch.bool"),
        ("to_string", [[[1]]], ValueError, r"shape \[1, 1, 1\]; they must be \[pos\] or \[batch"),
        ("to_string", torch.tensor([[0, -1]]), ValueError, "no token -1; ids run from 0 to 269"),
        ("to_str_tokens", [[1], [2]], ValueError, "takes one text, not 2"),
    ],
)
def test_errors_say_what_was_wrong(tiny, method, wrong, error, message):
    with unchecked_types(), pytest.raises(error, match=message):
        getattr(tiny, method)(wrong)


def test_unknown_padding_side(tiny):
    wanted = "padding_side is 'top'; it must be 'left' or 'right'"
    with unchecked_types(), pytest.raises(ValueError, match=wanted):
        tiny.to_tokens(["a"], padding_side="top")


# Where a tokenizer comes from.


@pytest.mark.parametrize(
    "names", [("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]
)
def test_from_a_folder(tiny, tmp_path, names):
    loaded = Tokenizer.from_pretrained(write(trained(), tmp_path, *names))
    assert loaded.d_vocab == tiny.d_vocab
    for text in TEXTS:
        assert loaded.to_tokens(text).tolist() == tiny.to_tokens(text).tolist()
        assert loaded.to_string(loaded.to_tokens(text)) == [END_OF_TEXT + text]


def test_from_the_hub(hub, with_hub):
    folder = hub.repos / "openai-community" / "gpt2"
    folder.mkdir(parents=True)
    write(trained(), folder, "vocab.json", "merges.txt")
    process = with_hub(
        "from clean_transformer.text.tokenizer import Tokenizer;"
        "print(Tokenizer.from_pretrained('gpt2').to_str_tokens(' the cat'))"
    )
    assert process.stdout == "['<|endoftext|>', ' the', ' cat']\n", process.stderr
    assert hub.downloaded == ["vocab.json", "merges.txt"]


def test_what_a_saved_tokenizer_would_cut_or_add_is_left_behind(tmp_path):
    backend = trained()
    ends = [(END_OF_TEXT, backend.token_to_id(END_OF_TEXT))]
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {END_OF_TEXT}", special_tokens=ends
    )
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    loaded = Tokenizer.from_pretrained(write(backend, tmp_path, "tokenizer.json"))
    assert loaded.to_str_tokens(" the cat sat") == [END_OF_TEXT, " the", " cat", " sat"]


def test_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "vocab.json").touch()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer; put tokenizer.json, or vocab"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("names", [("tokenizer.json",), ("vocab.json", "merges.txt")])
@pytest.mark.parametrize("content", ["", "{", "[1]", "<html>", "\udcff"])
def test_a_malformed_file(tmp_path, names, content):
    write(trained(), tmp_path, *names)
    (tmp_path / names[0]).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=f"{names[0]}.* cannot be read as a tokenizer \\(.*again"):
        Tokenizer.from_pretrained(tmp_path)


def test_malformed_merges(tmp_path):
    write(trained(), tmp_path, "vocab.json", "merges.txt")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ t\nĠthe\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"merges.txt cannot be read as a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_vocabulary_that_is_not_gpt2s():
    with pytest.raises(ValueError, match=r"lacks 1 of the tokens .* such as '<|endoftext|>'; give"):
        Tokenizer(trained(end="</s>"))
    words = tokenizers.Tokenizer(models.WordLevel({END_OF_TEXT: 0, "a": 1}, unk_token="a"))
    with pytest.raises(ValueError, match="a WordLevel tokenizer loses text"):
        Tokenizer(words)


def test_what_leaves_no_mark_is_seen():
    assert visible(" a\n\t\x00\x1f\x7f�日") == "·a↵␉␀␟␡�日"


@given(st.characters())
def test_no_two_characters_look_the_same_but_their_pictures(character: str):
    seen = visible(character)
    assert len(seen) == 1
    assert seen.isprintable() or not character.isascii()
    assert seen == character or ord(character) <= 32 or character == "\x7f"


def test_tensors_of_unequal_texts_need_padding():
    tokenizer = Tokenizer(trained())
    with pytest.raises(ValueError, match="different numbers of tokens; give padding=True"):
        tokenizer(["the cat", "mat, then"], return_tensors="pt")
    with unchecked_types(), pytest.raises(ValueError, match="'np'; it must be 'pt' or None"):
        tokenizer("the cat", return_tensors="np")
    with unchecked_types(), pytest.raises(ValueError, match="padding is 'max_length'; it must be"):
        tokenizer(["the cat", "mat"], padding="max_length")
    assert tokenizer("", return_tensors="pt").input_ids.dtype == torch.int64
