"""The shipped model. These tests measure every number in the README of `demo/` again."""

import contextlib
import io
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clean_transformer import DemoTransformer
from clean_transformer.demo import make as demo
from clean_transformer.demo import stories
from clean_transformer.text.tokenizer import Tokenizer
from clean_transformer.weights import hub

from ..helpers import assert_equal_states, unchecked_types
from .surprise import surprise

ROOT = Path(__file__).parents[2]
README = (ROOT / "clean_transformer/demo/README.md").read_text(encoding="utf-8")

N_STORIES = 200


@pytest.fixture(scope="module")
def model() -> DemoTransformer:
    return DemoTransformer.from_pretrained("demo", device="cpu").requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(model: DemoTransformer) -> Tokenizer:
    return model.tokenizer


# The package.


def test_the_shipped_model_needs_no_network(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise AssertionError("asked for a socket")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.chdir(tmp_path)

    model = DemoTransformer.from_pretrained("demo", device="cpu")

    assert model.cfg == replace(demo.CFG, initializer_range=model.cfg.initializer_range)
    assert model.tokenizer.d_vocab == model.cfg.d_vocab


def test_the_wheel_holds_the_shipped_model(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file in ("README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    shutil.copytree(ROOT / "clean_transformer", tmp_path / "clean_transformer")

    subprocess.run(
        [sys.executable, "-c", "import setuptools; setuptools.setup()", "build_py"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )

    built = tmp_path / "build/lib/clean_transformer/demo/model"
    assert sorted(file.name for file in built.iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "vocab.json",
    ]
    size = sum(file.stat().st_size for file in built.iterdir())
    assert_in_readme("size, license", [size / 1e6], digits=1)


# What it has learned.


def share_of_stories(model: DemoTransformer, temperature: float, count: int, seed: int) -> float:
    """The percentage of sampled texts that are stories of the grammar."""
    room, begun = model.cfg.n_ctx - 5, ["Once upon a time"] * count
    with unchecked_types():  # there are too many calls to check them all
        texts = model.generate(begun, room, temperature=temperature, seed=seed)
    return 100 * sum(stories.parse(text) is not None for text in texts) / count


@pytest.mark.slow
def test_sampled_stories_are_grammatical(model):
    shares = [
        # Five seeds, because the share of 200 stories varies by 1.5.
        sum(share_of_stories(model, temperature, N_STORIES, seed) for seed in range(5)) / 5
        for temperature in (1.0, 0.8)
    ]

    # Another machine may round differently, and so now and then draw another token.
    assert_in_readme("are stories of the grammar", shares, tolerance=1.0)
    assert min(shares) >= 95


def test_some_sampled_stories_are_grammatical(model):
    assert share_of_stories(model, 0.8, count=30, seed=0) >= 95


def test_the_likeliest_story_is_grammatical(model):
    room = model.cfg.n_ctx - 5
    assert stories.parse(model.generate("Once upon a time", room)) is not None


@pytest.fixture(scope="module")
def told() -> list[str]:
    return stories.generate(demo.HELD_OUT_SEED, N_STORIES)


@pytest.fixture(scope="module")
def known(told: list[str]) -> list[dict[str, str]]:
    """The facts of each story."""
    return [stories.parse(text) for text in told]


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer, told: list[str]) -> Int[Tensor, "batch pos"]:
    """Each story, with one <|endoftext|> before it and at least one after it."""
    return F.pad(tokenizer.to_tokens(told), (0, 1), value=tokenizer.eos_token_id)


@pytest.fixture(scope="module")
def logits(model: DemoTransformer, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "..."]:
    """The logits for each token except the first."""
    return model(tokens[:, :-1])


def test_its_loss_is_close_to_the_entropy_of_the_stories(tokenizer, told, tokens, logits):
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    is_end = (tokens[:, 1:] == tokenizer.eos_token_id).long()
    told_by_then = is_end.cumsum(dim=1) - is_end  # 0 up to the token that ends the story

    loss = losses[told_by_then == 0].sum() / N_STORIES

    assert_in_readme("this model, per story", [loss.item()], digits=2)
    entropy = sum(map(surprise, told)) / N_STORIES
    assert_in_readme("the grammar, per story", [entropy], digits=2)


def test_facts_are_remembered_where_a_bigram_model_guesses(tokenizer, known, tokens, logits):
    bigrams = bigram_counts(tokenizer, stories.generate(demo.SEED, 500))
    guesses = {"this model": logits, "a bigram model": bigrams[tokens[:, :-1]]}
    groups = (
        ("hero_end", "friend_end"),
        ("song",),
        ("color", "thing", "food", "far", "stranger"),
    )
    recalled = [told_before(tokenizer, known, tokens, facts)[:, 1:] for facts in groups]

    for who, scores in guesses.items():
        right = scores.argmax(dim=-1) == tokens[:, 1:]
        shares = [100 * right[where].double().mean().item() for where in recalled]
        assert_in_readme(who, shares, digits=1)


def bigram_counts(tokenizer: Tokenizer, texts: list[str]) -> Float[Tensor, "first second"]:
    """How often each token was followed by each other token."""
    ids = tokenizer.to_tokens(texts)
    counts = torch.zeros(tokenizer.d_vocab, tokenizer.d_vocab)
    return counts.index_put_((ids[:, :-1], ids[:, 1:]), torch.ones(()), accumulate=True)


def told_before(
    tokenizer: Tokenizer,
    known: list[dict[str, str]],
    tokens: Int[Tensor, "batch pos"],
    facts: tuple[str, ...],
) -> Bool[Tensor, "batch pos"]:
    """True for every token at which a story repeats one of the facts."""
    again = torch.zeros_like(tokens, dtype=torch.bool)
    for row, ids, story in zip(again, tokens, known, strict=True):
        for fact in facts:
            text = story[fact] if fact.endswith("_end") else f" {story[fact]}"
            for place in occurrences(tokenizer, ids, text)[1:]:
                row[place] = True
    return again


def occurrences(tokenizer: Tokenizer, ids: Int[Tensor, "pos"], text: str) -> list[Tensor]:
    """The positions of the text's tokens, for each of its occurrences."""
    sought = torch.tensor(tokenizer.backend.encode(text).ids)
    starts = (ids.unfold(0, len(sought), 1) == sought).all(dim=1).nonzero().flatten()
    return [start + torch.arange(len(sought)) for start in starts]


# Looking into it.


def test_the_heads_attend_as_the_readme_says(model, tokenizer, known, tokens):
    encoded = tokenizer.backend.encode_batch([f" {word}" for word in stories.RULES["word"]])
    n, words = 30, torch.tensor([one.ids[0] for one in encoded if len(one.ids) == 1])
    draws = torch.randint(len(words), (16, n), generator=torch.Generator().manual_seed(0))
    bos = torch.full((16, 1), tokenizer.bos_token_id)
    repeated = torch.cat([bos, words[draws], words[draws]], dim=1)
    second_time = torch.arange(2 * n + 1) > n
    # The query is the token before the repeated one: there, the model has to look it up.
    names, songs = (
        told_before(tokenizer, known, tokens, facts)[:, 1:]
        for facts in (("hero_end", "friend_end"), ("song",))
    )

    for what, read, queries in (
        ("names in stories", tokens[:, :-1], names),
        ("songs in stories", tokens[:, :-1], songs),
        ("random words", repeated, second_time.expand_as(repeated)),
    ):
        for layer, scores in enumerate(induction_scores(model, read, queries)):
            assert_in_readme(f"{what}, layer {layer}", scores, digits=2)

    _, cache = model.run_with_cache(repeated, names_filter="blocks.0.attn.hook_pattern")
    to_previous = cache["pattern", 0].diagonal(-1, dim1=2, dim2=3).mean(dim=(0, 2))
    assert_in_readme("the token before, layer 0", to_previous.tolist(), digits=2)


def induction_scores(
    model: DemoTransformer, tokens: Int[Tensor, "batch pos"], queries: Bool[Tensor, "batch pos"]
) -> list[list[float]]:
    """For each layer and head, the mean attention from the queries to where induction should look.

    These are all keys whose previous token is the same as the query's token.
    """
    previous = F.pad(tokens[:, :-1], (1, 0), value=-1)
    sought = previous[:, None, None, :] == tokens[:, None, :, None]
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    found = [(cache["pattern", layer] * sought).sum(dim=-1) for layer in range(model.cfg.n_layers)]
    return [shares.transpose(1, 2)[queries].mean(dim=0).tolist() for shares in found]


def test_the_examples_print_what_the_readme_says():
    steps = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", README, re.DOTALL)
    assert len(steps) == README.count("```python") >= 6
    names: dict[str, object] = {}
    for code, wanted in steps:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "README.md", "exec"), names)
        assert printed.getvalue() == wanted


def assert_in_readme(
    row: str, measured: list[float], digits: int = 0, tolerance: float | None = None
) -> None:
    """Compare the numbers at the start of the cells in this row of the README's tables."""
    found = re.search(rf"^\| {row} \|(.*)\|$", README, re.MULTILINE)
    assert found, f"demo/README.md has no row {row!r}"
    cells = found[1].split("|")
    printed = [float(re.match(r"[\s*]*([\d.]+)", cell)[1]) for cell in cells]
    assert measured == pytest.approx(printed, abs=tolerance or 0.51 * 10**-digits)


# How it is made.


def test_every_name_is_two_tokens_and_every_story_fits_into_a_window(tokenizer):
    for start in stories.RULES["hero_start"] + stories.RULES["friend_start"]:
        for end in stories.RULES["hero_end"]:
            assert tokenizer.backend.encode(f" {start}{end}").tokens == [f"Ġ{start}", end]
    texts = stories.generate(3, 1000)
    assert max(map(len, tokenizer.backend.encode_batch(texts))) + 2 <= demo.CFG.n_ctx


@pytest.mark.slow
def test_the_shipped_tokenizer_is_made_of_these_stories(tokenizer):
    made = demo.train_tokenizer(stories.generate(demo.SEED, demo.TOKENIZER_STORIES))

    assert made.backend.get_vocab() == tokenizer.backend.get_vocab()
    [told] = stories.generate(2, 1)
    assert made.to_tokens(told).equal(tokenizer.to_tokens(told))


def test_a_tokenizer_of_few_stories_has_the_parts_of_names_as_tokens():
    made = demo.train_tokenizer(stories.generate(demo.SEED, 100))

    assert made.d_vocab == demo.CFG.d_vocab
    starts = stories.RULES["hero_start"] + stories.RULES["friend_start"]
    assert {f"Ġ{start}" for start in starts} | {*stories.RULES["hero_end"]} <= set(
        made.backend.get_vocab()
    )


def test_each_window_is_one_story(tokenizer):
    texts = stories.generate(2, 9)

    ids = demo.windows(tokenizer, texts)

    assert len(ids) == 9 * demo.CFG.n_ctx + 1
    for row, text in zip(ids[:-1].reshape(9, -1), texts, strict=True):
        read = tokenizer.to_string(torch.from_numpy(row.astype(np.int64)))
        begin, told, *rest = read.split("<|endoftext|>")
        assert (begin, told) == ("", text)
        assert rest
        assert not any(rest)


def test_making_the_model_again_gives_the_same_bits(monkeypatch, tmp_path):
    for name in ("SONGS", "SIGHTED", "BOTH", "STORIES"):
        few = {"steps": 2, "batch": demo.SONGBOOKS + 1, "held_out_batches": 1}
        monkeypatch.setattr(demo, name, replace(getattr(demo, name), **few))
    monkeypatch.setattr(demo, "TOKENIZER_STORIES", 200)
    for run in ("one", "two"):
        monkeypatch.setattr(hub, "DEMO", tmp_path / run)
        demo.main(tmp_path / f"run {run}")

    one, two = (
        DemoTransformer.from_pretrained(tmp_path / run).state_dict() for run in ("one", "two")
    )
    assert_equal_states(one, two)
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == sorted(
        file.name for file in hub.DEMO.iterdir()
    )
