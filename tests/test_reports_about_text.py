"""Public reports about batches, caches, tokens and sampling; `.github/REPORTS.md` lists them."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch

from clean_transformer import KVCache, Tokenizer
from clean_transformer.text.sampling import choose, keep_top_k, sample
from clean_transformer.text.settings import Sampling
from tests.helpers import (
    assert_same_function,
    random_model,
    random_tokens,
    reading_model,
    trained,
    unchecked_types,
)

SHORT, LONG = "the cat sat", "the other cat sat on the mat"
REPORTS = Path(__file__).parents[1] / ".github" / "REPORTS.md"


def test_the_list_names_tests_that_exist():
    rows = re.findall(r"^\| (\S+#\d+) \|.*\| (.*) \|$", REPORTS.read_text("utf-8"), re.MULTILINE)
    assert len({number for number, _ in rows}) == len(rows) >= 40
    tests = Path(__file__).parent
    here = "".join(file.read_text("utf-8") for file in tests.glob("test_reports_about_*.py"))
    for number, where in rows:
        files = [*re.findall(r"tests/(\S+\.py)", where)]
        text = "".join((tests / file).read_text("utf-8") for file in files) or here
        for test in re.findall(r"`(test_\w+)`", where):
            assert f"def {test}(" in text, number


# Batches and padding.


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stop_tokens": [*range(0, 270, 3)]},
        {"beams": 3},
        {"beams": 3, "stop_tokens": [*range(0, 270, 3)]},
        {"repetition_penalty": 1.5},
        {"frequency_penalty": 1.0},
    ],
    ids=str,
)
def test_no_prompt_of_a_batch_affects_another(arguments: dict):
    model = reading_model()
    alone = [model.generate(text, 8, **arguments) for text in (SHORT, LONG)]
    assert model.generate([SHORT, LONG], 8, **arguments) == alone


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(side: str):
    model = reading_model().double()
    n_tokens = len(model.tokenizer.encode(SHORT)) + 1
    model.tokenizer.padding_side = side
    padded = model([SHORT, LONG])[0]
    assert_same_function(
        padded[-n_tokens:] if side == "left" else padded[:n_tokens], model(SHORT)[0]
    )
    losses = [model(text, return_type="loss", loss_per_token=True)[0] for text in (SHORT, LONG)]
    torch.testing.assert_close(
        model([SHORT, LONG], return_type="loss"), torch.cat(losses).mean(), rtol=1e-12, atol=0
    )


def test_the_tokenizer_pads_on_the_side_that_it_was_given():
    tokenizer = Tokenizer(trained())
    tokenizer.pad_token = tokenizer.eos_token  # the lines that most notebooks begin with
    tokenizer.pad_token_id = tokenizer.eos_token_id
    texts = [SHORT, LONG]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        encoded = tokenizer(texts, padding=True, return_tensors="pt")
        assert torch.equal(encoded.input_ids, tokenizer.to_tokens(texts, prepend_bos=False))
        assert torch.equal(tokenizer.to_tokens(texts), tokenizer.to_tokens(texts, None, side))
        mask = encoded.attention_mask
        assert torch.equal(mask, mask.sort(dim=1, descending=side == "right").values)
    assert copy.deepcopy(tokenizer).padding_side == "right"
    tokenizer.pad_token = "a"
    assert (tokenizer.pad_token_id, copy.deepcopy(tokenizer).pad_token) == (65, "a")
    assert tokenizer.to_tokens(["b", "bbb"], prepend_bos=False)[0, 1:].tolist() == [65, 65]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("padding_side", "center", "padding_side is 'center'; it must be 'left' or 'right'"),
        ("pad_token", "[PAD]", r"pad_token is '\[PAD\]', which is not in the vocabulary"),
        ("pad_token_id", 270, "pad_token_id is 270, which is not in the vocabulary"),
        ("pad_token_id", -1, "pad_token_id is -1, which is not in the vocabulary"),
        ("add_bos_token", True, "add_bos_token"),
        ("truncation_side", "left", "truncation_side"),
        ("eos_token", "x", "eos_token"),
    ],
)
def test_the_tokenizer_ignores_no_setting(name: str, value, message: str):
    with unchecked_types(), pytest.raises((ValueError, AttributeError), match=message):
        setattr(Tokenizer(trained()), name, value)


# KV caches.


@torch.no_grad()
def test_a_padded_cache_is_continued_by_several_tokens():
    model = random_model()
    cache = KVCache(2, 10, torch.tensor([[0, 0, 1], [1, 1, 1]]))
    model(torch.tensor([[0, 0, 4], [1, 2, 3]]), cache)
    copied = copy.deepcopy(cache)  # a prompt that is read once, and continued twice
    for kept, added in ((cache, [[5, 6], [7, 8]]), (copied, [[9, 1], [2, 2]])):
        logits = model(torch.tensor(added), kept)
        for row, before in enumerate(([4], [1, 2, 3])):
            whole = model(torch.tensor([before + added[row]]))
            assert_same_function(logits[row], whole[0, -2:])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_changes_logits_by_rounding_only(dtype: torch.dtype):
    model, tokens, cache = random_model(dtype=dtype), random_tokens(batch=1), KVCache(2, 10)
    parts = [model(part, cache) for part in tokens.split([3, 1, 3], dim=1)]
    assert_same_function(torch.cat(parts, dim=1), model(tokens))
    padded = KVCache(2, 10, torch.tensor([[0, 0, 0, 1, 1, 1, 1]]))
    assert model(tokens, padded).isfinite().all()  # masks do not overflow


# Tokens and text.


@pytest.mark.parametrize(
    "text", [" ?", "y is ?", " 'sensing", "don 't . , !", "test phrase", "🤗 \n"]
)
def test_decoding_gives_the_same_text(text: str):
    backend = trained()
    backend.add_tokens(["special token", " 's"])
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    tokenizer = Tokenizer(backend)
    for each in (text, f"a special token{text}", text * 40):
        assert tokenizer.decode(tokenizer.encode(each)) == each


def test_a_stream_holds_back_half_a_character():
    model = reading_model()
    ids = iter(model.tokenizer.encode("🤗🤗"))

    def force(logits, hook):
        logits[:] = -math.inf
        logits[..., next(ids)] = 0
        return logits

    with model.hooks([("unembed.hook_out", force)]):
        assert [*model.stream("a", 6)] == ["🤗", "�"]


def test_the_first_token_and_the_room_are_kept():
    model = reading_model(n_ctx=8)
    ids = model.tokenizer.encode("cat")
    assert model.to_tokens("cat", prepend_bos=False)[0].tolist() == ids
    assert model.to_tokens("cat")[0].tolist() == [0, *ids]
    assert len(model.generate([[1] * 5], 3)[0]) == 8
    with pytest.raises(ValueError, match="more than the n_ctx=8 positions"):
        model.generate([[1] * 5], 4)
    with pytest.raises(ValueError, match="there is no token -4"):
        model.tokenizer.decode([-4])


# Settings of `generate`.


def test_stop_tokens_are_an_id_or_several():
    model = reading_model()
    first = model.generate(model.to_tokens(SHORT), 1)[0, -1].item()
    for one in (first, [first], (5, first), torch.tensor([first])):
        with unchecked_types():
            assert model.generate(SHORT, 9, stop_tokens=one) == SHORT
            assert [*model.stream(SHORT, 9, stop_tokens=one)] == []


@pytest.mark.parametrize("number", ["128", 2.5, None, 0])
def test_the_number_of_new_tokens_is_checked(number):
    message = f"max_new_tokens is {number!r}; it must be 1 or more, as an int"
    with unchecked_types(), pytest.raises(ValueError, match=re.escape(message)):
        reading_model().generate(SHORT, number)


# Sampling.


def test_temperature_0_is_greedy():
    model = reading_model()
    assert model.generate(SHORT, 4, temperature=0, seed=1) == model.generate(SHORT, 4)


def test_filters_keep_no_other_token():
    rising, generator = torch.tensor([[-4.0, -3, -2, -1]]), torch.Generator().manual_seed(0)
    assert keep_top_k(rising, 2).softmax(dim=-1).nonzero()[:, 1].tolist() == [2, 3]
    settings = Sampling(temperature=1.0, top_k=2, top_p=0.7)  # of the two, the first has 0.731
    assert {int(choose(rising, settings, generator)) for _ in range(50)} == {3}
    impossible = torch.tensor([[-math.inf, 0, -math.inf]]).expand(300_000, 3)
    assert (sample(impossible, generator) == 1).all()
