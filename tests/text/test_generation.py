"""What a model does with prompts and texts, and what it refuses."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clean_transformer.model import DemoTransformer
from clean_transformer.text.settings import Sampling, SamplingSettings
from clean_transformer.text.tokenizer import END_OF_TEXT, Tokenizer

from ..helpers import random_model, random_tokens, reading_model, trained, unchecked_types

pytestmark = pytest.mark.usefixtures("one_thread")

STRINGS = st.lists(st.sampled_from([*"abcdehstx, ", "at", " the", "e c"]), max_size=3)


def test_token_ids_give_token_ids():
    model, tokens = random_model(), random_tokens(length=3)
    drawing = {"temperature": 1.0, "seed": 0}
    rows = model.generate(tokens.tolist(), 4, **drawing)
    assert [row[:3] for row in rows] == tokens.tolist()
    same = model.generate(tokens.int(), 4, **drawing)
    assert torch.equal(same, torch.tensor(rows, dtype=torch.int32))
    stop = [30, rows[0][4]]
    assert not {*stop} & {*rows[1][3:]}
    filled = model.generate(tokens, 4, stop_tokens=stop, **drawing)
    assert filled.tolist() == [[*rows[0][:5], 30, 30], rows[1]]


def test_a_text_gives_the_text_and_what_follows():
    model = reading_model()
    ids = model.to_tokens("the cat")[0].tolist()
    [row] = model.generate([ids], 12)
    text = model.generate("the cat", 12)
    assert text == "the cat" + model.to_string(row[len(ids) :])
    both = model.generate(["the cat", "on the mat, then"], 12)
    assert both == [text, model.generate("on the mat, then", 12)]


def test_a_text_can_be_read_without_end_of_text_before_it():
    model = reading_model()
    ids = model.to_tokens(["the cat"], prepend_bos=False)
    for beams in (1, 2):
        [row] = model.generate(ids, 4, beams=beams, stop_tokens=[])
        text = model.generate("the cat", 4, beams=beams, stop_tokens=[], prepend_bos=False)
        assert text == model.to_string(row)
    with pytest.raises(TypeError, match="prepend_bos is for texts, not for token ids"):
        model.generate(ids, 4, prepend_bos=True)


def test_a_text_ends_before_the_end_of_text_unless_told_otherwise():
    model = reading_model()
    end = model.tokenizer.eos_token_id
    with torch.no_grad():
        model.unembed.b_U[end] = 100
    assert model.generate("the cat", 5) == "the cat"
    assert [*model.stream("the cat", 5)] == []
    assert model.generate("the cat", 2, stop_tokens=[]) == "the cat" + 2 * END_OF_TEXT
    tokens = model.to_tokens("the cat")
    assert model.generate(tokens, 3)[0, -3:].tolist() == [end] * 3


def test_a_text_begins_and_ends_with_the_models_own_tokens():
    model, read = reading_model(), []
    model.tokenizer = Tokenizer(trained(), bos_token_id=3, stop_tokens=[5, 7])
    model.embed.register_forward_pre_hook(lambda _, args: read.append(args[0][0].tolist()))
    with torch.no_grad():
        model.unembed.b_U[7] = 100
    assert model.generate("the cat", 5) == "the cat"
    assert model.generate("the cat", 5, beams=2) == "the cat"
    assert [*model.stream("the cat", 5)] == []
    assert {prompt[0] for prompt in read if len(prompt) > 1} == {3}


def test_a_stop_string_may_span_tokens():
    model = reading_model()
    whole = model.generate("the cat", 12)[len("the cat") :]
    ids = model.generate(model.to_tokens("the cat"), 12)[0, -12:].tolist()
    for first, second in [(3, 5), (0, 2), (8, 10)]:
        before, after = (model.to_string(ids[:place]) for place in (first, second + 1))
        string = after[len(before) + 1 :] or after[-1]
        expected = whole[: whole.index(string)]
        assert model.generate("the cat", 12, stop_strings=string) == "the cat" + expected
        assert "".join(model.stream("the cat", 12, stop_strings=["never", string])) == expected


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), strings=STRINGS, n=st.integers(1, 15))
def test_a_stream_gives_what_generate_gives(seed: int, strings: list[str], n: int):
    model = reading_model()
    drawing = {"temperature": 2.0, "seed": seed, "stop_strings": strings}
    pieces = [*model.stream("the cat sat", n, **drawing)]
    assert "".join(pieces) == model.generate("the cat sat", n, **drawing)[len("the cat sat") :]
    assert all(pieces)


def test_a_stream_comes_as_it_is_made():
    model, read = reading_model(), []
    model.embed.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    stream = model.stream("the cat", 40)
    next(stream)
    assert len(read) < 20


def test_the_tokenizer_is_that_of_the_folder(tmp_path: Path):
    model = reading_model(b_U=False)
    model.save_pretrained(tmp_path)
    trained().save(str(tmp_path / "tokenizer.json"))
    loaded = DemoTransformer.from_pretrained(tmp_path, device="cpu")
    assert loaded.generate("the cat", 5) == model.generate("the cat", 5)
    assert loaded.tokenizer is loaded.tokenizer
    assert loaded.to_str_tokens("the cat") == model.to_str_tokens("the cat")
    loaded.tokenizer = other = Tokenizer(trained())
    assert loaded.tokenizer is other


# What cannot be done.


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([[1] * 7], {}, "7 tokens and 4 new ones are more than the n_ctx=10 positions that the"),
        (
            [[1], [1] * 7],
            {"beams": 2},
            "shorten the prompt by 1 tokens, or ask for 3 new tokens or",
        ),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
        ([[1], []], {}, "every prompt needs 1 token or more"),
        ([[1]], {"beams": 0}, "beams=0 with temperature=0.0: there must be 1 beam or more"),
        ([[1]], {"beams": 2, "temperature": 1.0}, "beam search does not draw; use temperature 0"),
        ([[1]], {"top_p": 0.5}, "set a temperature too"),
        ([[31]], {}, "token ids run from 31 to 31; this vocabulary has ids 0 to 30"),
        ("text", {}, "this model came without a tokenizer; give it token ids, or assign"),
        ([[1]], {"stop_strings": "a"}, "this model came without a tokenizer"),
        ([[1]], {"stop_tokens": -1}, "stop_tokens has -1; this vocabulary has ids 0 to 30"),
        ([[1]], {"stop_tokens": [3, 31]}, "stop_tokens has 31; this vocabulary has ids 0 to 30"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(prompt, arguments: dict, message: str):
    model, calls = random_model(), []
    model.embed.register_forward_pre_hook(lambda *_: calls.append("embed"))
    with pytest.raises(ValueError, match=re.escape(message)), unchecked_types():
        model.generate(prompt, **{"max_new_tokens": 4} | arguments)
    assert not calls


def test_after_a_prompt_without_room_nobody_is_told_to_ask_for_fewer_tokens():
    with pytest.raises(ValueError, match=r"shorten the prompt by 24 tokens$"):
        random_model().generate([[1] * 30], 4)


@pytest.mark.parametrize("prompt", [[1, 2], torch.tensor([1, 2]), [("a",)], [1.5]])
def test_what_is_no_prompt(prompt):
    with pytest.raises(TypeError, match="a prompt is a text, a list of texts"), unchecked_types():
        random_model().generate(prompt, 1)


def test_an_empty_stop_string():
    with pytest.raises(ValueError, match="a stop string is empty"):
        reading_model().generate("a", 1, stop_strings="")


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("max_tokens", "did you mean 'max_new_tokens'?"),
        ("temprature", "did you mean 'temperature'?"),
        ("sampling", "it takes "),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_an_unknown_setting_is_refused_before_any_work(method: str, argument: str, hint: str):
    model = random_model()  # which could not read the text
    message = f"{method}() got an unexpected keyword argument {argument!r}; {hint}"
    with pytest.raises(TypeError, match=re.escape(message)):
        getattr(model, method)("text", **{argument: 1})


@pytest.mark.parametrize("method", [DemoTransformer.generate, DemoTransformer.stream])
def test_the_signature_names_every_setting(method):
    shown = inspect.signature(method).parameters
    types = get_type_hints(Sampling)
    for field in dataclasses.fields(Sampling):
        assert shown[field.name].default == field.default
        assert shown[field.name].annotation == types[field.name]
        assert shown[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert "sampling" not in shown
    assert [*shown][:3] == ["self", "prompt" if "prompt" in shown else "text", "max_new_tokens"]


def test_the_settings_have_the_same_types_in_both_declarations():
    assert get_type_hints(SamplingSettings) == get_type_hints(Sampling)
