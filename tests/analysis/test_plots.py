"""The figures hold the numbers that they are drawn from, and are written whole or not at all."""

import importlib
import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plotly.io import from_json

from clean_transformer.activation_cache import ActivationCache
from clean_transformer.analysis import plots
from clean_transformer.analysis.lens import logit_lens
from clean_transformer.analysis.plots.style import label
from clean_transformer.analysis.prediction import predict
from clean_transformer.model import DemoTransformer

from ..helpers import reading_model
from ..pages import CHROMIUM, Page

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "the <b>cat</b> sat on\nthe mat, $$"


@pytest.fixture(scope="module")
def model() -> DemoTransformer:
    return reading_model(n_layers=3, n_heads=5, n_ctx=40)


@pytest.fixture(scope="module")
def tokens(model: DemoTransformer) -> list[str]:
    return model.to_str_tokens(TEXT)


@pytest.fixture(scope="module")
def cache(model: DemoTransformer) -> ActivationCache:
    return model.run_with_cache(model.to_tokens(TEXT))[1]


def assert_shows(drawn: object, values: torch.Tensor) -> None:
    np.testing.assert_array_equal(np.asarray(drawn), values.numpy())


def axis_labels(axis: go.layout.XAxis | go.layout.YAxis) -> list[str]:
    """What an axis says at 0, 1, …"""
    assert list(axis.tickvals) == [*range(len(axis.ticktext))]
    return list(axis.ticktext)


# What plotly is told to write for the tokens of TEXT: its spaces seen, its markup not obeyed.
def labels(tokens: list[str]) -> list[str]:
    written = {"<": "&lt;", ">": "&gt;", "$": "&#36;", " ": "·", "\n": "↵"}
    return ["".join(written.get(character, character) for character in token) for token in tokens]


@pytest.mark.parametrize("layer", [None, 0, 2, -3])
@pytest.mark.parametrize("head", [None, 0, 4, -5])
def test_attention_patterns(cache, tokens, layer: int | None, head: int | None):
    figure = plots.attention_pattern(cache, tokens, layer=layer, head=head)
    layers = range(3) if layer is None else [layer % 3]
    heads = range(5) if head is None else [head % 5]
    panels = [*product(layers, heads)]
    assert len(figure.data) == len(figure.layout.annotations) == len(panels)
    for drawn, title, (at_layer, at_head) in zip(
        figure.data, figure.layout.annotations, panels, strict=True
    ):
        assert_shows(drawn.z, cache["pattern", at_layer, "attn"][0, at_head])
        assert f"layer {at_layer}, head {at_head}<" in drawn.hovertemplate
        assert title.text in (f"layer {at_layer}, head {at_head}", f"{at_layer}.{at_head}")
    # One and the same scale, the first token on top, a name at every position of every panel.
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    for axis in [*figure.select_xaxes(), *figure.select_yaxes()]:
        assert axis_labels(axis) == labels(tokens)
    assert {axis.autorange for axis in figure.select_yaxes()} == {"reversed"}


def test_each_pattern_is_in_the_row_of_its_layer(cache, tokens):
    figure = plots.attention_pattern(cache, tokens)
    places = [(drawn.xaxis, drawn.yaxis) for drawn in figure.data]
    assert len({*places}) == 15
    lefts = [figure.layout[x.replace("x", "xaxis")].domain[0] for x, _ in places]
    tops = [figure.layout[y.replace("y", "yaxis")].domain[1] for _, y in places]
    assert lefts == sorted({*lefts}) * 3
    assert tops == [top for top in sorted({*tops}, reverse=True) for _ in range(5)]


def test_without_a_batch_dimension_it_is_the_same(cache, tokens):
    single = ActivationCache(cache, cache.model).remove_batch_dim()
    pattern = plots.attention_pattern(cache, tokens, layer=1, head=1)
    assert plots.attention_pattern(single, tokens, layer=1, head=1) == pattern
    assert plots.residual_norms(single, tokens) == plots.residual_norms(cache, tokens)


def test_token_probabilities(model, tokens):
    prediction = predict(model, TEXT)
    figure = plots.token_probabilities(prediction.token_probabilities, tokens)
    [line] = figure.data
    assert_shows(line.y, prediction.token_probabilities)
    assert list(line.x) == [*range(1, len(tokens))]
    assert axis_labels(figure.layout.xaxis) == labels(tokens)


def test_embedding_similarity(model, cache, tokens):
    figure = plots.embedding_similarity(cache["embed"], tokens)
    rows = model.embed.W_E[model.to_tokens(TEXT)[0]].detach().double()
    units = rows / rows.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(figure.data[0].z, (units @ units.T).numpy(), rtol=0, atol=1e-6)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-1, 1)
    assert axis_labels(figure.layout.xaxis) == axis_labels(figure.layout.yaxis) == labels(tokens)


def test_position_similarity(model):
    W_pos = model.pos_embed.W_pos
    figure = plots.position_similarity(W_pos, [0, 7, -1])
    units = W_pos.detach().double() / W_pos.detach().double().norm(dim=-1, keepdim=True)
    assert [line.name for line in figure.data] == ["position 0", "position 7", "position 39"]
    for line, position in zip(figure.data, [0, 7, 39], strict=True):
        assert line.y[position] == pytest.approx(1)
        np.testing.assert_allclose(line.y, (units @ units[position]).numpy(), rtol=0, atol=1e-6)


def test_residual_norms(cache, tokens):
    figure = plots.residual_norms(cache, tokens)
    assert [line.name for line in figure.data] == [
        f"{position} {label}" for position, label in enumerate(labels(tokens))
    ]
    names = [f"{layer}_{point}" for layer in range(3) for point in ("pre", "mid")]
    for position, line in enumerate(figure.data):
        assert list(line.x) == [*names, "final_post"]
        norms = [cache[f"resid_{name[2:]}", int(name[0])][0, position].norm() for name in names]
        norms.append(cache["resid_post", 2][0, position].norm())
        np.testing.assert_allclose(line.y, norms, rtol=1e-6)


def test_losses_of_a_training_run(tmp_path: Path):
    lines = [(1, 3.5, None), (2, 3.25, 3.4), (3, 3.0, None), (4, 2.5, 3.1)]
    keys = ("step", "loss", "held_out_loss")
    text = "".join(json.dumps(dict(zip(keys, line, strict=True))) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    drawn = plots.losses(tmp_path / "metrics.jsonl").data
    assert [line.name for line in drawn] == ["training", "held out"]
    assert [[*line.x] for line in drawn] == [[1, 2, 3, 4], [2, 4]]
    assert [[*line.y] for line in drawn] == [[3.5, 3.25, 3.0, 2.5], [3.4, 3.1]]


def test_logit_lens(model, tokens):
    figure = plots.logit_lens(model, TEXT)
    log_probs, depth = logit_lens(model, TEXT)
    best = log_probs.max(dim=-1)
    [heat] = figure.data
    assert_shows(heat.z, best.values.exp())
    assert [list(row) for row in heat.text] == [
        labels(model.to_str_tokens(row)) for row in best.indices
    ]
    assert axis_labels(figure.layout.xaxis) == labels(tokens)
    assert axis_labels(figure.layout.yaxis) == depth == ["0_pre", "1_pre", "2_pre", "final_post"]
    assert plots.logit_lens(model, model.to_tokens(TEXT)[0]) == figure


def test_half_precision_is_drawn_too(cache, tokens):
    half = ActivationCache({name: value.bfloat16() for name, value in cache.items()}, cache.model)
    figure = plots.attention_pattern(half, tokens, layer=1, head=2)
    assert_shows(figure.data[0].z, half["pattern", 1, "attn"][0, 2].float())


@given(st.text())
def test_a_label_is_never_markup(token: str):
    shown = label(token)
    assert not {*shown} & {*"<> $\n\t\x00\x1b\x7f"}
    assert (shown == "") == (token == "")


def two_texts(cache: ActivationCache) -> ActivationCache:
    twice = {name: torch.cat([value, value]) for name, value in cache.items()}
    return ActivationCache(twice, cache.model)


REFUSALS: dict[str, tuple[Callable[..., object], type[Exception], str]] = {
    "layer": (lambda c, t: plots.attention_pattern(c, t, layer=3), IndexError, "no layer 3"),
    "head": (lambda c, t: plots.attention_pattern(c, t, head=-6), IndexError, "heads 0 to 4"),
    "position": (
        lambda c, t: plots.position_similarity(c["pos_embed"][0], [99]),
        IndexError,
        "no position 99",
    ),
    "other tokens": (
        lambda c, t: plots.attention_pattern(c, t[1:]),
        ValueError,
        "to_str_tokens of the text that the model read",
    ),
    "other tokens' norms": (
        lambda c, t: plots.residual_norms(c, [*t, "x"]),
        ValueError,
        "tokens for",
    ),
    "other tokens' vectors": (
        lambda c, t: plots.embedding_similarity(c["embed"], t[:3]),
        ValueError,
        "3 tokens for",
    ),
    "other tokens' probabilities": (
        lambda c, t: plots.token_probabilities(torch.ones(len(t)), t),
        ValueError,
        "tokens for",
    ),
    "two texts": (
        lambda c, t: plots.attention_pattern(two_texts(c), t),
        ValueError,
        "of 2 texts; run the model on one",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(cache, tokens, name: str):
    draw, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        draw(cache, tokens)


# --- files ---


def test_a_saved_page_needs_nothing_else(cache, tokens, tmp_path: Path):
    file = tmp_path / "pattern.html"
    file.write_text("before")
    plots.save(plots.attention_pattern(cache, tokens, layer=0, head=1), file)
    text = file.read_text(encoding="utf-8")
    elements = [*Page(text).root.walk()]
    assert {"script", "div"} <= {element.tag for element in elements}
    assert not [e for e in elements if e.attributes.keys() & {"src", "href"} or e.tag == "link"]
    assert "plotly.js v" in text[:2000]
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_a_saved_png_is_the_picture(model, tokens, tmp_path: Path):
    file = tmp_path / "lens.png"
    figure = plots.token_probabilities(torch.rand(len(tokens) - 1), tokens)
    plots.save(figure.update_layout(width=320, height=210), str(file))
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(content[at : at + 4], "big") for at in (16, 20)] == [640, 420]
    assert [*tmp_path.iterdir()] == [file]


@pytest.fixture
def undrawable(monkeypatch: pytest.MonkeyPatch) -> go.Figure:
    for name in ("to_html", "to_image"):
        monkeypatch.delattr(f"plotly.basedatatypes.BaseFigure.{name}")
    return go.Figure()


@pytest.mark.parametrize("name", ["picture.pdf", "picture", "picture.html.gz", ".png"])
def test_another_suffix_is_refused_before_drawing(name: str, tmp_path: Path, undrawable):
    with pytest.raises(ValueError, match=r"name it \*.html or \*.png"):
        plots.save(undrawable, tmp_path / name)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["picture.png", "picture.html"])
def test_a_missing_folder_is_refused_before_drawing(name: str, tmp_path: Path, undrawable):
    with pytest.raises(FileNotFoundError, match=rf"no folder .*nowhere' for '{name}'"):
        plots.save(undrawable, tmp_path / "nowhere" / name)


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "picture.html"
    file.write_text("old")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plots.save(go.Figure(), file)
    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file]


def test_the_style_survives_json():
    figure = from_json(go.Figure(layout={"template": plots.STYLE}).to_json())
    assert figure.layout.template.layout.font.color == "#1c2430"


def test_without_plotly_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "clean_transformer.analysis.plots")
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(
        ImportError, match=r"not installed: pip install 'clean-transformer\[plots\]'"
    ):
        importlib.import_module("clean_transformer.analysis.plots")
