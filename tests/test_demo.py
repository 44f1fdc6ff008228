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
from torch import Tensor

from clean_transformer import DemoTransformer, demo, stories
from clean_transformer.kv_cache import KVCache
from clean_transformer.tokenizer import Tokenizer
from clean_transformer.weights.hub import DEMO

from .helpers import assert_equal_states

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

N_STORIES, TEMPERATURE = 200, 1.0


@pytest.fixture(scope="module")
def model() -> DemoTransformer:
    return DemoTransformer.from_pretrained("demo", device="cpu").requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained("demo")


def test_the_shipped_model_needs_no_network(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise AssertionError("asked for a socket")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.chdir(tmp_path)

    model = DemoTransformer.from_pretrained("demo", device="cpu")

    assert model.cfg == demo.CFG
    assert Tokenizer.from_pretrained("demo").d_vocab == model.cfg.d_vocab


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

    built = tmp_path / "build/lib/clean_transformer/weights/demo"
    assert sorted(file.name for file in built.iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "vocab.json",
    ]
    assert sum(file.stat().st_size for file in built.iterdir()) < 5e6


def sample(model: DemoTransformer, tokenizer: Tokenizer, count: int) -> list[str]:
    """Stories from their first token on, all at once."""
    cache = KVCache(model.cfg.n_layers, model.cfg.n_ctx)
    tokens = torch.full((count, 1), tokenizer.bos_token_id)
    drawn = [tokens]
    ended = torch.zeros(count, 1, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    while not ended.all() and len(drawn) < model.cfg.n_ctx:
        probabilities = (model(tokens, cache)[:, -1] / TEMPERATURE).softmax(dim=-1)
        tokens = probabilities.multinomial(1, generator=generator)
        ended |= tokens == tokenizer.eos_token_id
        drawn.append(tokens)
    texts = [tokenizer.to_string(row) for row in torch.cat(drawn, dim=1)[:, 1:]]
    return [text.partition("<|endoftext|>")[0] for text in texts]


def test_sampled_stories_are_grammatical(model, tokenizer):
    texts = sample(model, tokenizer, N_STORIES)

    share = sum(stories.parse(text) is not None for text in texts) / N_STORIES

    assert share >= 0.95
    assert_in_readme("are stories of the grammar", [100 * share], digits=1)


def test_facts_are_remembered_where_a_bigram_model_guesses(model, tokenizer):
    told = stories.generate(demo.HELD_OUT_SEED, 50)
    tokens = tokenizer.to_tokens(told)
    bigrams = bigram_counts(tokenizer, stories.generate(demo.SEED, 500))
    guesses = {"this model": model(tokens), "a bigram model": bigrams[tokens]}

    groups = (("hero", "friend", "helper"), ("song",), ("home", "far"))
    recalled = [recalled_tokens(tokenizer, told, tokens, facts) for facts in groups]
    for who, logits in guesses.items():
        right = logits[:, :-1].argmax(dim=-1) == tokens[:, 1:]
        shares = [100 * right[where].double().mean().item() for where in recalled]
        assert_in_readme(who, shares, digits=1)


def bigram_counts(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """[d_vocab d_vocab]: how often the one token was followed by the other."""
    ids = torch.cat([tokenizer.to_tokens(text)[0] for text in texts])
    counts = torch.zeros(tokenizer.d_vocab, tokenizer.d_vocab)
    return counts.index_put_((ids[:-1], ids[1:]), torch.ones(()), accumulate=True)


def recalled_tokens(
    tokenizer: Tokenizer, told: list[str], tokens: Tensor, facts: tuple[str, ...]
) -> Tensor:
    """[batch pos-1]: the tokens, but for the first, of what was told before in the same story."""
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, text in enumerate(told):
        known = stories.parse(text)
        offsets = [(0, 0), *tokenizer.backend.encode(text).offsets]
        for fact in facts:
            for mention in [*re.finditer(rf"\b{known[fact]}\b", text)][1:]:
                within = [
                    place
                    for place, (start, end) in enumerate(offsets)
                    if start < mention.end() and mention.start() < end
                ]
                mask[row, within[1:]] = True
    return mask[:, 1:]


def test_the_induction_heads_are_where_the_readme_says(model, tokenizer):
    n = 60
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(1, tokenizer.d_vocab, (16, n), generator=generator)
    tokens = torch.cat([torch.zeros(16, 1, dtype=torch.int64), random, random], dim=1)

    _, cache = model.run_with_cache(tokens, names=lambda name: name.endswith("hook_pattern"))

    for layer in range(model.cfg.n_layers):
        # Query q is the repeated token, key q + 1 - n the one after it was seen first.
        diagonal = cache["pattern", layer].diagonal(1 - n, dim1=-2, dim2=-1)[..., -n:]
        assert_in_readme(f"layer {layer}", diagonal.mean(dim=(0, -1)).tolist(), digits=2)


def assert_in_readme(row: str, measured: list[float], digits: int) -> None:
    """The README's table row of that name has these numbers, to its digits."""
    found = re.search(rf"^\| {row} \|(.*)\|$", README, re.MULTILINE)
    assert found, f"README.md has no row {row!r}"
    printed = [float(cell.strip(" %*")) for cell in found[1].split("|")]
    assert measured == pytest.approx(printed, abs=0.51 * 10**-digits)


def test_each_window_begins_with_a_story(tokenizer):
    texts = stories.generate(2, 9)

    ids = demo.windows(tokenizer, texts)

    n_windows, rest = divmod(len(ids), demo.CFG.n_ctx)
    assert (n_windows, rest) == (4, 1)
    for number, row in enumerate(ids[:-1].reshape(n_windows, -1)):
        first, second = texts[2 * number : 2 * number + 2]
        text = f"<|endoftext|>{first}<|endoftext|>{second}"
        assert text.startswith(tokenizer.to_string(torch.from_numpy(row.astype(np.int64))))


def test_making_the_model_again_gives_the_same_bits(monkeypatch, tmp_path):
    brief = replace(demo.TRAINING, steps=2, batch=1, held_out_batches=1, save_every=1)
    monkeypatch.setattr(demo, "TRAINING", brief)
    monkeypatch.setattr(demo, "TOKENIZER_STORIES", 200)
    for run in ("one", "two"):
        monkeypatch.setattr(demo, "DEMO", tmp_path / run)
        demo.main(tmp_path / f"run {run}")

    one, two = (
        DemoTransformer.from_pretrained(tmp_path / run).state_dict() for run in ("one", "two")
    )
    assert_equal_states(one, two)
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == sorted(
        file.name for file in DEMO.iterdir()
    )
