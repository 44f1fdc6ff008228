"""Generation gives the ids that transformers gives, draws as it should, and ends in time."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.swapping import HookPointsLost, swap
from clean_transformer.text.decoding import Stop, decode_one, prefill
from clean_transformer.text.tokenizer import Tokenizer
from clean_transformer.weights.synthetic import stress

from ..helpers import (
    assert_drawn_from,
    assert_same_function,
    random_model,
    random_tokens,
    trained,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CFG = Config(n_layers=2, n_heads=2, d_model=32, d_head=16, d_mlp=64, d_vocab=90, n_ctx=24)
END = CFG.d_vocab - 1
# Of every length, from a single token to all but one of the positions. They begin as texts do:
# the end of a text is what transformers pads with too, and it counts padding as repeated.
LENGTHS = [1, 23, *range(2, 20)]
PROMPTS = [[END, *random_tokens(CFG, 1, n, seed=n)[0, 1:].tolist()] for n in LENGTHS]

GREEDY: dict[str, Any] = {}
PENALISED = {"repetition_penalty": 1.4}
BEAMS = {"beams": 4}
METHODS = pytest.mark.parametrize("method", [GREEDY, PENALISED, BEAMS, BEAMS | PENALISED])


def pair(folder: Path, ours: DemoTransformer) -> tuple[DemoTransformer, Any]:
    """A model in float64, and Hugging Face's with the same weights."""
    transformers = pytest.importorskip("transformers")
    ours.save_pretrained(folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64)
    return ours, theirs


def small_model(kind: str) -> DemoTransformer:
    """One whose greedy continuations do not come down to a token or two."""
    if kind == "stress":
        return DemoTransformer.from_state_dict(stress(CFG), CFG).double()
    model = random_model(CFG)
    with torch.no_grad():
        model.embed.W_E *= 3
        model.pos_embed.W_pos *= 3
        model.ln_final.b.zero_()
    return model


@pytest.fixture(scope="module", params=["random", "stress"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return pair(tmp_path_factory.mktemp("both"), small_model(request.param))


def their_ids(theirs, prompts: list[list[int]], n: int, stop: list[int], **method) -> list:
    """What `GPT2LMHeadModel.generate` makes of the prompts, padded on the left."""
    longest = max(map(len, prompts))
    padded = torch.tensor([[END] * (longest - len(ids)) + ids for ids in prompts])
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    beams = method.pop("beams", 1)
    output = theirs.generate(
        padded,
        attention_mask=torch.tensor(mask),
        max_new_tokens=n,
        num_beams=beams,
        eos_token_id=stop or None,
        pad_token_id=END,
        **{"do_sample": False} | method,
    )
    return [
        ids + up_to_the_first(stop, new)
        for ids, new in zip(prompts, output[:, longest:].tolist(), strict=True)
    ]


def up_to_the_first(stop: list[int], new: list[int]) -> list[int]:
    places = [place for place, token in enumerate(new) if token in stop]
    return new[: places[0] + 1] if places else new


# The same ids as `GPT2LMHeadModel.generate`.


@METHODS
def test_single_prompts_go_on_as_in_transformers(both, method: dict):
    ours, theirs = both
    for ids in PROMPTS[::2]:
        n = min(4, CFG.n_ctx - len(ids))
        assert ours.generate([ids], n, **method) == their_ids(theirs, [ids], n, [], **method)


@METHODS
def test_a_batch_up_to_the_last_position_goes_on_as_in_transformers(both, method: dict):
    ours, theirs = both
    prompts = [ids[:12] for ids in PROMPTS]
    generated = ours.generate(prompts, 12, **method)
    assert generated == their_ids(theirs, prompts, 12, [], **method)
    assert max(map(len, generated)) == CFG.n_ctx


@pytest.mark.parametrize("method", [GREEDY, BEAMS, {"beams": 3, **PENALISED}])
def test_stop_tokens_end_each_prompt_as_in_transformers(both, method: dict):
    ours, theirs = both
    prompts = [ids[:12] for ids in PROMPTS]
    unstopped = ours.generate(prompts, 12, **method)
    # Such as not every prompt comes upon, and not at once.
    used = Counter(token for row in unstopped for token in row[-12:])
    stop = sorted(used, key=lambda token: used[token])[:6]
    generated = ours.generate(prompts, 12, stop_tokens=stop, **method)
    assert generated == their_ids(theirs, prompts, 12, stop, **method)
    lengths = {len(new) - len(ids) for new, ids in zip(generated, prompts, strict=True)}
    assert len(lengths) >= 4


def test_all_of_1024_positions_go_on_as_in_transformers(tmp_path: Path):
    cfg = Config(n_layers=1, n_heads=1, d_model=8, d_head=8, d_mlp=8, d_vocab=50, n_ctx=1024)
    ours, theirs = pair(tmp_path, random_model(cfg))
    prompt = random_tokens(cfg, 1, 700)
    generated = ours.generate(prompt, 324)
    assert generated.shape == (1, 1024)
    assert torch.equal(generated, theirs.generate(prompt, max_new_tokens=324, do_sample=False))


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 7},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
)
def test_the_same_seed_draws_what_transformers_draws(both, sampling: dict):
    pytest.importorskip("transformers", minversion="5.24")  # older versions draw in another way
    ours, theirs = both
    prompts = [ids[:12] for ids in PROMPTS]
    torch.manual_seed(5)
    expected = their_ids(theirs, prompts, 12, [], **{"do_sample": True, "top_k": 0} | sampling)
    assert ours.generate(prompts, 12, seed=5, **sampling) == expected


def test_what_is_drawn_has_the_probabilities_that_the_model_gives(both):
    ours, _ = both
    prompt = torch.tensor([PROMPTS[4]])
    drawn = ours.generate(prompt.repeat(5000, 1), 2, temperature=1.5, top_k=4, seed=0)[:, -2:]

    def kept(tokens: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = (ours(tokens)[0, -1] / 1.5).topk(4)
        return values.softmax(-1), ids

    with torch.no_grad():
        first, ids = kept(prompt)
        pairs = {}
        for p, token in zip(first, ids, strict=True):
            second, after = kept(torch.cat([prompt, token[None, None]], dim=1))
            pairs |= {(int(token), int(b)): p * q for q, b in zip(second, after, strict=True)}
    places = {pair: place for place, pair in enumerate(pairs)}
    seen = torch.tensor([places[a, b] for a, b in drawn.tolist()])
    assert_drawn_from(seen, torch.stack([*pairs.values()]))


# Prefill and decode.


@torch.no_grad()
def test_only_the_last_position_is_unembedded():
    model, tokens = random_model(), random_tokens()
    seen, unembed = [], model.unembed.forward
    model.unembed.forward = lambda x: (seen.append(x.shape[1]), unembed(x))[1]
    logits, cache = prefill(model, tokens.tolist(), 1)
    assert_same_function(logits, model(tokens)[:, -1])
    more = random_tokens(batch=2, length=1, seed=1)
    after = decode_one(model, more[:, 0], cache)
    assert_same_function(after, model(torch.cat([tokens, more], 1))[:, -1])
    assert seen[0] == seen[2] == 1
    assert cache.n_ctx == cache.length == tokens.shape[1] + 1


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_logits_are_in_float32_or_more(dtype: torch.dtype, expected: torch.dtype):
    model = random_model(dtype=dtype)
    logits, cache = prefill(model, [[1, 2]], 1)
    assert logits.dtype == expected
    assert decode_one(model, torch.tensor([3]), cache).dtype == expected


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    method=st.sampled_from([GREEDY, PENALISED, BEAMS, {"beams": 2, "frequency_penalty": 0.4}]),
)
def test_a_prompt_goes_on_in_a_batch_as_it_does_alone(lengths: list[int], method: dict):
    model = random_model()
    prompts = [random_tokens(batch=1, length=n, seed=n)[0].tolist() for n in lengths]
    alone = [model.generate([ids], 4, stop_tokens=[3, 7], **method)[0] for ids in prompts]
    assert model.generate(prompts, 4, stop_tokens=[3, 7], **method) == alone


class Averaging(nn.Module):
    """Somebody's attention, which knows of no cache: the mean of what came so far."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


@torch.no_grad()
def test_modules_that_know_of_no_cache_generate_too():
    model, tokens = small_model("random"), torch.tensor(PROMPTS[3:4])
    with pytest.warns(HookPointsLost):
        swap(model, "blocks.1.attn", Averaging())
    expected = tokens
    for _ in range(6):
        following = model(expected)[:, -1:].argmax(-1)
        expected = torch.cat([expected, following], dim=1)
    assert torch.equal(model.generate(tokens, 6), expected)
    assert model.generate([*PROMPTS[:1], *expected[:, :-6].tolist()], 6)[1] == expected[0].tolist()


@pytest.mark.parametrize("method", [GREEDY, BEAMS, {"temperature": 1.0, "top_p": 0.9, "seed": 1}])
def test_every_device_generates_the_same(device: str, dtype: torch.dtype, method: dict):
    model, prompts = small_model("stress").to(dtype), [ids[:12] for ids in PROMPTS[:4]]
    expected = model.generate(prompts, 12, **method)
    moved = model.to(device)
    assert moved.generate(prompts, 12, **method) == expected
    assert moved.generate(torch.tensor(prompts[1:2], device=device), 1).device.type == device


# When a continuation ends.


TEXT = Tokenizer(trained())
NEW = st.lists(st.integers(0, TEXT.d_vocab - 1), max_size=12)
# Of what these tokens spell, whole tokens and parts of them, ASCII and not.
STRINGS = st.lists(
    st.one_of(
        st.sampled_from([" cat", "cat sat", "t s", "ca", "the c", "é", "a", "at t"]),
        st.text(min_size=1, max_size=2),
    ),
    max_size=3,
)
SPELLED = st.lists(
    st.sampled_from(TEXT.to_tokens(" the cat sat, a éat", prepend_bos=False)[0].tolist()),
    max_size=12,
)


@settings(max_examples=200)
@given(tokens=st.one_of(NEW, SPELLED), strings=STRINGS)
def test_a_text_ends_where_a_stop_string_begins(tokens: list[int], strings: list[str]):
    stop = Stop(strings=strings, tokenizer=TEXT)
    new: list[int] = []
    settled = [""]
    for token in tokens:
        assert not any(string in TEXT.to_string(new) for string in strings)
        new.append(token)
        if stop.ends(new):
            break
        settled.append(stop.settled_text(new))
    text = stop.text(new)
    assert TEXT.to_string(new).startswith(text)
    assert not any(string in text for string in strings)
    ended = any(string in TEXT.to_string(new) for string in strings)
    assert ended == any(TEXT.to_string(new)[len(text) :].startswith(s) for s in strings)
    # What was settled on the way stays, and grows.
    for shorter, longer in zip(settled, [*settled[1:], text], strict=True):
        assert longer.startswith(shorter)


def test_the_first_of_two_stop_strings_counts():
    cat = TEXT.to_tokens(" cat", prepend_bos=False)[0].tolist()
    assert len(cat) == 1
    for strings in (["t", "c"], ["c", "t"]):
        assert Stop(strings=strings, tokenizer=TEXT).text(cat) == " "


def test_text_is_settled_as_soon_as_it_can_be():
    stop = Stop(strings=["cat!"], tokenizer=TEXT)

    def settled(text: str, cut: int = 0) -> str:
        ids = TEXT.to_tokens(text, prepend_bos=False)[0].tolist()
        return stop.settled_text(ids[: len(ids) - cut])

    assert settled("the ca") == "the "
    assert settled("the cat,") == "the cat,"
    assert settled("the é", cut=1) == "the "
    assert settled("the é") == "the é"
