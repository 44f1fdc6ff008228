"""What objects show in a notebook: short text, and HTML that disturbs no other cell."""

import html
import re
import zlib
from base64 import b64decode
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clean_transformer.activation_cache import ActivationCache
from clean_transformer.analysis.attention_view import attention_view
from clean_transformer.analysis.prediction import predict, strings
from clean_transformer.analysis.text_page import explain, render
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.mlp import MLP
from clean_transformer.parity.operations.check import check_operations
from clean_transformer.parity.results import DeviceRun, SuiteReport
from clean_transformer.reports import tensors
from clean_transformer.reports.page import framed, in_words
from clean_transformer.swapping.effects import effect
from clean_transformer.swapping.swaps import swap
from clean_transformer.variants import ReluMLP

from ..helpers import random_model, random_tokens, reading_model
from ..pages import Page, assert_self_contained, unpack

TEXT = "the cat</script><b>\n日"


@pytest.fixture(scope="module")
def model() -> DemoTransformer:
    return reading_model(n_layers=2, n_heads=3, d_model=12)


@pytest.fixture(scope="module")
def cache(model) -> ActivationCache:
    return model.run_with_cache(model.to_tokens(TEXT))[1]


@pytest.fixture(scope="module")
def shown(model, cache) -> dict[str, object]:
    run = DeviceRun("cuda", "float32", not_checked="this machine has no cuda")
    tokens = model.to_tokens(TEXT)
    with swap(model, "blocks.*.mlp", ReluMLP) as swapped:
        changed = effect(model, swapped, tokens)
    return {
        "cache": cache,
        "prediction": predict(model, TEXT),
        "view": attention_view(cache, model.to_str_tokens(TEXT)),
        "explanation": explain(model, TEXT),
        "effect": changed,
        "swap": swapped,
        "operations": check_operations(model, tokens),
        "run": run,
        "suite": SuiteReport("weights", model.cfg, (1, 2), {}, None, "no reference", [run]),
        "config": model.cfg,
        "tokenizer": model.tokenizer,
    }


KINDS = [
    *("cache", "prediction", "view", "explanation", "effect", "swap", "operations", "run"),
    *("suite", "config", "tokenizer"),
]
PAGES = {"view", "explanation", "effect"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_short(shown, kind: str):
    assert len(repr(shown[kind])) < 320
    assert "\n" not in repr(shown[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_html_is_closed_and_alone(shown, kind: str):
    """It asks for nothing from outside, has no markup of the text, and no rule for other cells."""
    shown_html = shown[kind]._repr_html_()
    if kind in PAGES:
        [frame] = [element for element in Page(shown_html).root.walk() if element.tag == "iframe"]
        assert frame.text.startswith("Run this cell to see the page")
        page = frame.attributes["srcdoc"]
        assert shown_html.count("<") == 2  # the whole page is inside of the attribute
        assert_self_contained(re.sub(r'<script type="application/json".*?</script>', "", page))
        return
    assert_self_contained(
        re.sub(r"mask-image: url\(data:image/png;base64,[\w+/=]*\)", "", shown_html)
    )
    root = Page(shown_html).root
    [cell] = root.children
    assert cell.attributes["class"] == "clean-transformer"
    [style] = [element.text for element in cell.walk() if element.tag == "style"]
    # One rule, with all other rules inside of it.
    depth, outermost = 0, 0
    for brace in re.findall(r"[{}]", style):
        outermost += depth == 0
        depth += 1 if brace == "{" else -1
    assert (depth, outermost) == (0, 1)
    assert style.strip().startswith(".clean-transformer")
    assert not [e for e in cell.walk() if "id" in e.attributes or e.tag in ("script", "b")]


def test_the_colors_follow_jupyterlab(shown):
    text = shown["config"]._repr_html_()
    for light, scheme in (("true", "light"), ("false", "dark")):
        assert f'[data-jp-theme-light="{light}"] & {{ color-scheme: {scheme}; }}' in text


def test_a_frame_holds_the_page_as_it_is(shown):
    page = render(shown["explanation"])
    found = re.search(r'srcdoc="([^"]*)"', framed(page))
    assert found
    assert html.unescape(found[1]) == page


# --- the cache ---


def pixels(address: str) -> Tensor:
    """The opacity of each pixel of a picture, from 0 to 255."""
    data = b64decode(address.removeprefix("data:image/png;base64,"))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    length = int.from_bytes(data[33:37], "big")
    lines = torch.tensor([*zlib.decompress(data[41 : 41 + length])]).view(height, 1 + 2 * width)
    assert not lines[:, 0].any()
    return lines[:, 2::2]


def test_a_picture_shows_the_weights():
    pattern = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    large = pixels(tensors.picture(pattern))
    assert large.shape == (48, 48)
    for query in range(2):
        for key in range(2):
            square = large[24 * query : 24 * query + 24, 24 * key : 24 * key + 24]
            assert (square == round(255 * float(pattern[query, key]) ** 0.5)).all()


def test_a_picture_of_a_long_text_is_small_and_shows_the_largest_weights():
    pattern = torch.zeros(480, 480)
    pattern[479, 0] = 1.0
    small = pixels(tensors.picture(pattern))
    assert small.shape == (48, 48)
    assert small.nonzero().tolist() == [[47, 0]]


def test_each_row_of_the_table(cache):
    found = {row.name: row for row in tensors.rows(cache)}
    length = cache["pattern", 0].shape[-1]
    assert found["attn.hook_pattern"] == tensors.Row(
        "attn.hook_pattern",
        "0–1",
        f"1 × 3 × {length} × {length}",
        "float32",
        f"{2 * 3 * length**2 * 4 / 1024:.1f} KiB",
    )
    assert found["hook_embed"].blocks == ""
    assert sum(1 for _ in found) < len(cache)


def test_ranges():
    assert tensors.ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert tensors.ranges([]) == ""


def test_pictures_of_a_batch_and_of_many_heads(monkeypatch):
    model = random_model()
    _, cache = model.run_with_cache(random_tokens(batch=2))
    text = cache._repr_html_()
    assert "of the first input" in text
    assert text.count("data:image/png") == 2 * 3
    assert tensors.picture(cache["pattern", 1][0, 2]) in text
    monkeypatch.setattr(tensors, "MOST_PICTURES", 5)
    assert cache._repr_html_().count("data:image/png") == 3
    assert "data:image/png" not in cache.to("meta")._repr_html_()
    assert ActivationCache({}, model)._repr_html_()


# --- predictions ---


def test_the_colors_and_the_expected_tokens(model):
    prediction = predict(model, TEXT)
    tokens = Page(prediction._repr_html_()).root.all("class", "token")
    assert len(tokens) == len(prediction.tokens) == len(prediction.expected)
    for token, probability in zip(tokens[1:], prediction.token_probabilities.tolist(), strict=True):
        assert f"--probability: {probability}" in token.attributes["style"]
    for token, scores in zip(tokens, prediction.expected, strict=True):
        rows = [element for element in token.walk() if element.tag == "tr"]
        assert len(rows) == len(scores) == 5
        for row, score in zip(rows, scores, strict=True):
            assert float(row.children[1].text) == pytest.approx(score.probability, rel=5e-3)


def test_expected_tokens_at_every_position(model):
    tokens = model.to_tokens(TEXT)
    logits = model(tokens)[0]
    prediction = predict(model, TEXT, top=3)
    for row, scores in zip(logits, prediction.expected, strict=True):
        best = row.topk(3)
        assert [score.id for score in scores] == best.indices.tolist()
        assert [score.logit for score in scores] == best.values.tolist()
    for score in prediction.top + prediction.bottom:
        assert score.token == model.to_string([score.id])


def test_ids_stand_for_unknown_tokens(model):
    assert strings(random_model(), [3, 1]) == ["3", "1"]
    known = model.tokenizer.d_vocab
    assert strings(model, [known, 1]) == [str(known), model.to_string([1])]


# --- the attention view ---


def test_the_view_has_the_weights_of_the_cache(model, cache, tmp_path: Path):
    tokens = model.to_str_tokens(TEXT)
    view = attention_view(cache, tokens)
    query, key = torch.tril_indices(len(tokens), len(tokens))
    for layer, heads in enumerate(view.patterns):
        exact = cache["pattern", layer][0][:, query, key]
        found = torch.tensor([unpack(head, len(tokens)) for head in heads]) / 1000
        torch.testing.assert_close(found, exact, rtol=0, atol=5.01e-4)
    view.save(tmp_path / "view.html")
    assert (tmp_path / "view.html").read_text(encoding="utf-8") == view.render()


def test_a_view_needs_one_text_and_its_tokens(model, cache):
    with pytest.raises(ValueError, match=r"1 tokens for \d+ positions"):
        attention_view(cache, ["the"])
    _, of_two = model.run_with_cache(random_tokens(model.cfg, batch=2))
    with pytest.raises(ValueError, match="the activation is of 2 texts"):
        attention_view(of_two, [""] * 7)


def test_a_view_of_patterns_with_nan_is_refused(model):
    _, cache = model.run_with_cache(TEXT)
    cache["pattern", 1][0, 0, 2, 1] = torch.nan
    with pytest.raises(ValueError, match="the model computes NaN for this text; run `clean-tr"):
        attention_view(cache, model.to_str_tokens(TEXT))


# --- swaps ---


def test_a_swap_says_what_it_replaced():
    model = random_model()
    with swap(model, "blocks.*.mlp", ReluMLP) as swapped:
        assert repr(swapped) == "Swap(MLP → ReluMLP at blocks.0.mlp, blocks.1.mlp)"
        assert "in place" in swapped._repr_html_()
        with swap(model, "blocks.0.mlp", MLP) as again:
            assert repr(again) == "Swap(ReluMLP → MLP at blocks.0.mlp)"
    assert repr(swapped) == "Swap(MLP → ReluMLP at blocks.0.mlp, blocks.1.mlp; restored)"
    assert "restored" in swapped._repr_html_()


def test_names_in_words():
    assert in_words(["a", "b", "c"]) == "a, b, c"
    assert in_words([*"abcde"]) == "a, b, … e (5)"
