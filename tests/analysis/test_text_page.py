"""The page tells what the API computes, to mouse and keyboard, on a machine without a network."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from clean_transformer.activation_cache import ActivationCache
from clean_transformer.analysis import text_page as explanations
from clean_transformer.analysis.lens import logit_lens
from clean_transformer.analysis.packing import pack
from clean_transformer.analysis.prediction import predict
from clean_transformer.analysis.text_page import Explanation, explain, render, write_html
from clean_transformer.cli import app
from clean_transformer.model import DemoTransformer
from clean_transformer.text.symbols import visible

from ..helpers import reading_model, unchecked_types
from ..pages import CHROMIUM, Element, Page, assert_self_contained, browse, unpack

pytestmark = pytest.mark.usefixtures("one_thread")

# Everything that could end a script, start an element, or leave no mark.
TEXT = "the cat</script><b>\n&lt;\t日"


@pytest.fixture(scope="module")
def model() -> DemoTransformer:
    return reading_model(n_layers=3, n_heads=5, d_model=20, seed=5)


@pytest.fixture(scope="module")
def cache(model: DemoTransformer) -> ActivationCache:
    return model.run_with_cache(model.to_tokens(TEXT), remove_batch_dim=True)[1]


@pytest.fixture(scope="module")
def explanation(model: DemoTransformer) -> Explanation:
    return explain(model, TEXT)


@pytest.fixture(scope="module")
def page(explanation: Explanation) -> str:
    return render(explanation)


# --- the numbers are the API's ---


def same_to_four_digits(shown: float, exact: float) -> bool:
    return shown == pytest.approx(exact, rel=5.01e-4)


def test_tokens(model, explanation):
    ids = model.to_tokens(TEXT)[0].tolist()
    assert explanation.ids == ids
    for shown, token in zip(explanation.tokens, model.to_str_tokens(TEXT), strict=True):
        assert shown == token or (token == "\N{REPLACEMENT CHARACTER}" and shown[:2] == r"\x")
    assert {*ids} <= explanation.labels.keys()
    for id_, label in explanation.labels.items():
        [token] = model.to_str_tokens([id_])
        assert label == visible(token) or "\N{REPLACEMENT CHARACTER}" in token


def test_token_probabilities_and_ranks(model, explanation):
    prediction = predict(model, TEXT)
    first, *probabilities = explanation.probabilities
    assert first is None
    assert len(probabilities) == len(prediction.token_probabilities)
    for shown, exact in zip(probabilities, prediction.token_probabilities.tolist(), strict=True):
        assert same_to_four_digits(shown, exact)
    with torch.no_grad():
        order = model(model.to_tokens(TEXT))[0].argsort(dim=-1, descending=True)
    expected = [
        order[position].tolist().index(id_) + 1 for position, id_ in enumerate(explanation.ids[1:])
    ]
    assert explanation.ranks == [None, *expected]


def test_logit_lens(model, explanation):
    log_probs, labels = logit_lens(model, TEXT)
    assert len(explanation.lens) == len(labels) == 4
    for layer, exact in zip(explanation.lens, log_probs, strict=True):
        for scores, row in zip(layer, exact, strict=True):
            order = row.argsort(descending=True)[:5].tolist()
            assert [id_ for id_, _ in scores] == order
            for id_, probability in scores:
                assert same_to_four_digits(probability, math.exp(row[id_]))


def test_the_last_depth_is_the_model_s_own_answer(model, explanation):
    top = predict(model, TEXT).top
    scores = explanation.lens[-1][-1]
    assert [id_ for id_, _ in scores] == [score.id for score in top]
    for (_, probability), score in zip(scores, top, strict=True):
        assert same_to_four_digits(probability, score.probability)


def test_attention(cache, explanation):
    assert [len(heads) for heads in explanation.patterns] == [5] * 3
    length = len(explanation.ids)
    for layer, heads in enumerate(explanation.patterns):
        for head, shown in enumerate(heads):
            exact = cache["pattern", layer, "attn"][head]
            weights = iter(unpack(shown, length))
            for query in range(length):
                for key in range(query + 1):
                    assert abs(next(weights) - 1000 * exact[query, key]) <= 0.5001
            assert next(weights, None) is None


def test_it_takes_half_precision(model):
    half = reading_model(n_layers=3, n_heads=5, d_model=20, seed=5).bfloat16()
    shown, exact = (
        torch.tensor([[unpack(head, 3) for head in layer] for layer in found.patterns]) / 1000
        for found in (explain(half, "the cat"), explain(model, "the cat"))
    )
    torch.testing.assert_close(shown, exact, rtol=0, atol=0.05)


# --- what is refused ---


def test_weights_are_rounded_as_little_as_the_page_allows(model, monkeypatch):
    exact = explain(model, TEXT)
    assert exact.step == 1
    size = sum(len(head) for layer in exact.patterns for head in layer)
    for most, step in ((size, 1), (size - 1, 2)):
        monkeypatch.setattr(explanations, "MOST_CHARACTERS", most)
        found = explain(model, TEXT)
        assert found.step == step
    for layer, others in zip(exact.patterns, found.patterns, strict=True):
        for head, other in zip(layer, others, strict=True):
            pairs = zip(unpack(head, COUNT), unpack(other, COUNT), strict=True)
            assert all(abs(2 * rounded - weight) <= 1 for weight, rounded in pairs)
    assert "rounded to multiples of 0.2%" in render(found)
    assert "rounded to multiples" not in render(exact)


def test_too_large_a_page_is_refused(model, monkeypatch):
    monkeypatch.setattr(explanations, "MOST_CHARACTERS", 500)
    message = r"a page of 24 tokens would be too large .* shorten the text to about (\d+) tokens"
    with pytest.raises(ValueError, match=message) as refused:
        explain(model, TEXT)
    assert 1 <= int(re.search(message, str(refused.value))[1]) < 24


@given(st.lists(st.sampled_from([0, 0, 0, 1, 4, 31, 32, 999, 1000]), min_size=1, max_size=300))
def test_packing(weights: list[int]):
    weights = [0] * 2000 + weights  # gaps of several digits
    length = 100
    weights += [0] * (length * (length + 1) // 2 - len(weights))
    [packed] = pack(torch.tensor([weights], dtype=torch.int16), 1)
    assert unpack(packed, length) == weights
    [packed] = pack(torch.tensor([weights], dtype=torch.int16), 10)
    assert unpack(packed, length) == [(weight + 5) // 10 for weight in weights]


def test_more_tokens_than_positions_are_refused(model):
    with pytest.raises(ValueError, match="are more than the n_ctx"):
        explain(model, "x" * model.cfg.n_ctx)


def test_a_model_that_computes_nan_is_refused():
    broken = reading_model()
    with torch.no_grad():
        broken.blocks[0].mlp.b_out[0] = math.nan
    with pytest.raises(ValueError, match=r"computes NaN for this text; run .* doctor"):
        explain(broken, "the cat")


def test_a_model_without_a_tokenizer_is_refused(model):
    mute = DemoTransformer(model.cfg)
    with pytest.raises(ValueError, match="came without a tokenizer"):
        explain(mute, "the cat")


# --- one file, and nothing else ---


def json_of(page: Element, name: str) -> Any:
    """What is in the element of that id."""
    [element] = page.all("id", name)
    return json.loads(element.text)


def test_the_data_in_the_page(explanation, page):
    inline = json_of(Page(page).root, "data")
    told = json.loads(json.dumps(vars(explanation) | {"cfg": None}))  # whose keys are strings
    assert inline == {name: told[name] for name in inline}
    assert inline.keys() == told.keys() - {"model", "cfg", "tokens"}


def test_nothing_in_a_text_is_markup(explanation):
    markup = """</script><b onclick="x('y')">&amp;"""
    ids = explanation.ids
    told = replace(
        explanation,
        model=markup,
        tokens=[f"{markup}{position}" for position in range(len(ids))],
        labels={id_: f"{markup}{id_}" for id_ in explanation.labels},
    )
    text = render(told)
    page = Page(text).root
    assert not {element.tag for element in page.walk()} & {"img", "b"}
    assert text.count("</script>") == 2
    options = page.all("role", "option")
    assert [option.text for option in options] == told.tokens
    assert [option.attributes["aria-label"] for option in options] == [
        f"token {position}: {told.labels[id_]}" for position, id_ in enumerate(ids)
    ]
    labels = {str(id_): name for id_, name in told.labels.items()}
    assert json_of(page, "data")["labels"] == labels


def test_a_line_break_is_seen_and_made(explanation, page):
    shown = [option.text for option in Page(page).root.all("role", "option")]
    assert shown == [token.replace("\n", "↵") for token in explanation.tokens]
    assert page.count("<br>") == TEXT.count("\n")


def test_no_network(page):
    assert_self_contained(re.sub(r'<script type="application/json".*?</script>', "", page))
    for element in Page(page).root.walk():
        assert not [name for name in element.attributes if name.startswith("on")]


def test_the_largest_page(explanation):
    # 1024 tokens in 12 layers of 12 heads, and as many characters as are allowed.
    head = "A" * (explanations.MOST_CHARACTERS // 144)
    lens = [explanation.lens[-1] * 43] * 13
    text = render(replace(explanation, patterns=[[head] * 12] * 12, lens=lens))
    assert len(lens[0]) > 1024
    assert len(text.encode()) < 5.5e6


def test_a_part_of_a_character_is_shown_as_bytes(model):
    found = explain(model, "a 🤗")
    shown = "".join(found.labels[id_] for id_ in found.ids[1:])
    assert shown == r"a·\xf0\x9f\xa4\x97"
    assert "".join(found.tokens[1:]) == r"a \xf0\x9f\xa4\x97"


def test_other_temperatures(model, explanation):
    with torch.no_grad():
        logits = model(model.to_tokens(TEXT))[0]
    for number, temperature in enumerate(explanation.temperatures):
        exact = (logits / temperature).softmax(dim=-1)
        for row, scores, scales in zip(
            exact, explanation.lens[-1], explanation.scales, strict=True
        ):
            for id_, probability in scores:
                heated = math.exp(math.log(probability) / temperature - scales[number])
                assert heated == pytest.approx(float(row[id_]), rel=1e-3 / temperature, abs=1e-6)


def test_the_file_is_written_whole(explanation, page, tmp_path: Path):
    file = tmp_path / "page.html"
    file.write_text("before")
    write_html(explanation, file)
    assert file.read_text(encoding="utf-8") == page
    assert [*tmp_path.iterdir()] == [file]


# --- the command ---


@pytest.fixture
def folder(model: DemoTransformer, tmp_path: Path) -> Path:
    """The model where `from_pretrained` finds it."""
    folder = tmp_path / "small"
    reading_model(n_layers=3, n_heads=5, d_model=20, b_U=False).save_pretrained(folder)
    model.tokenizer.backend.save(str(folder / "tokenizer.json"))
    return folder


def test_the_command(folder: Path, tmp_path: Path):
    file = tmp_path / "page.html"
    arguments = ["explain", TEXT, "--html", str(file), "--weights", str(folder), "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {file}\n"
    model = DemoTransformer.from_pretrained(folder, device="cpu")
    assert file.read_text(encoding="utf-8") == render(explain(model, TEXT))
    assert "<h1>How small reads this text</h1>" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "file", "weights", "message"),
    [
        ("the cat", "nowhere/page.html", "no/such/weights", "no folder 'nowhere' for 'page.html'"),
        ("the cat", "page.html", "no/such/weights", "no/such/weights"),
        ("x" * 100, "page.html", "small", "101 tokens are more than the n_ctx=60"),
    ],
)
def test_the_command_says_in_one_line_what_it_cannot_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, file: str, weights: str, message: str
):
    monkeypatch.chdir(folder.parent)
    with unchecked_types():
        result = CliRunner().invoke(app, ["explain", text, "--html", file, "--weights", weights])
    assert result.exit_code == 2
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert [*folder.parent.iterdir()] == [folder]


# --- in a browser ---

DRIVER = """
const text = (id) => at(id).textContent;
const scores = (id) => [...at(id).children].map((line) =>
  [line.firstChild.textContent, Number(line.lastChild.textContent)]);
const weight = (made) => Number(made.style.getPropertyValue("--w"));
const positions = (are) => tokens.flatMap((made, position) => are(made) ? [position] : []);
const facts = () => Object.fromEntries([...at("this").querySelectorAll("dt")].map((name) =>
  [name.textContent, name.nextSibling.textContent]));
const opacity = (made) => Number(made.getAttribute("fill-opacity"));
const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);

function pixel(layer, head, query, key) {
  const middle = (place, token) => Math.floor(
    devicePixelRatio * (edge + pitch * place + thumb * (token + 0.5) / counts.token));
  const first = 4 * (middle(layer, query) * image.width + middle(head, key));
  return [...image.data.slice(first, first + 3)];
}

const seen = [];
function look(step) {
  const active = document.activeElement;
  seen.push({
    step, address: location.hash, focus: active.id || active.dataset.token, facts: facts(),
    title: text("this-title"), next: scores("next"),
    earlyTitle: text("early-title"), early: scores("early"),
    attendsTitle: text("attends-title"), attends: scores("attends"),
    selects: [at("layer").value, at("head").value], shades: tokens.map(weight),
    selected: positions((made) => made.ariaSelected === "true"),
    stops: positions((made) => made.tabIndex === 0),
    map: [...map.querySelectorAll(".cell")].map(opacity),
    tip: tip.hidden ? null : tip.textContent, status: text("status"),
  });
}

const press = (key, held = {}) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...held }));
const mouse = (kind, target, place = {}) => target.dispatchEvent(
  new MouseEvent(kind, { bubbles: true, ...place }));
function select(part, value) {
  at(part).value = value;
  at(part).dispatchEvent(new Event("change"));
}

function place(layer, head) {
  const { left, top } = canvas.getBoundingClientRect();
  return { clientX: left + edge + head * pitch + 5, clientY: top + edge + layer * pitch + 5 };
}

const steps = {
  start: () => {},
  right: () => press("ArrowRight"),
  left: () => press("ArrowLeft"),
  "left again": () => press("ArrowLeft"),
  down: () => press("ArrowDown"),
  "down beyond": () => press("ArrowDown"),
  up: () => press("ArrowUp"),
  "]": () => press("]"),
  "] again": () => press("]"),
  "[": () => press("["),
  home: () => press("Home"),
  "left beyond": () => press("ArrowLeft"),
  end: () => press("End"),
  "right beyond": () => press("ArrowRight"),
  "alt left": () => press("ArrowLeft", { altKey: true }),
  point: () => mouse("mouseover", tokens[2]),
  away: () => mouse("mouseover", document.body),
  click: () => mouse("click", tokens[4]),
  layer: () => select("layer", 1),
  head: () => select("head", 4),
  "in the map": () => { at("map").focus(); press("ArrowRight"); },
  "point at a cell": () => mouse("mouseover", pattern[6][3]),
  "away again": () => mouse("mouseover", document.body),
  "in a select": () => { at("layer").focus(); press("ArrowLeft"); },
  "in the heads": () => { at("heads").focus(); press("ArrowUp"); },
  "click a head": () => mouse("click", canvas, place(2, 3)),
  "point at the lens": () => mouse("mouseover", cells[1][7]),
  "point at a heading": () => mouse("mouseover", heading[3]),
  "click the lens": () => mouse("click", cells[1][7]),
  "shade by probability": () => select("color", "probability"),
  "shade by loss": () => select("color", "loss"),
  "shade by attention": () => select("color", "attention"),
  hotter: () => { warmth.value = 10; warmth.dispatchEvent(new Event("input")); },
  "as it is": () => { warmth.value = 6; warmth.dispatchEvent(new Event("input")); },
};
for (const [step, act] of Object.entries(steps)) { act(); look(step); }

const heads = data.patterns.map((layer, row) => layer.map((_, head) =>
  data.ids.map((_, query) => data.ids.map((_, key) => pixel(row, head, query, key)))));
const rows = cells.map((row) => row.map((made) =>
  [made.textContent, weight(made), made.classList.contains("follows")]));
const headings = heading.map((made) => made.textContent), titles = bars.map((made) => made.title);

addEventListener("hashchange", () => {
  look("address");
  const told = JSON.stringify({ seen, heads, rows, headings, titles });
  document.body.append(element("pre", { id: "seen" }, told));
});
location.hash = "#token=5&layer=99&head=1&unknown=3";
"""


def browsed(text: str, folder: Path) -> tuple[str, list[str]]:
    """The page in the browser once its scripts have run, and what its console says."""
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    return browse(file, folder / "profile", "#token=3&layer=1&head=2")


@pytest.fixture(scope="module")
def driven(page: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page showed after each step of `DRIVER`."""
    if not CHROMIUM:
        pytest.skip("no Chromium is installed")
    ending = "</script>\n</body>"
    assert page.count(ending) == 1
    text = page.replace(ending, f"{DRIVER}{ending}")
    document, console = browsed(text, tmp_path_factory.mktemp("browser"))
    assert console == []
    return json_of(Page(document).root, "seen")


# The token, layer and head that are chosen after each step, of 3 layers, 5 heads and this many:
COUNT = 24
LAST = COUNT - 1
STEPS = {
    "start": (3, 1, 2),
    "right": (4, 1, 2),
    "left": (3, 1, 2),
    "left again": (2, 1, 2),
    "down": (2, 2, 2),
    "down beyond": (2, 2, 2),
    "up": (2, 1, 2),
    "]": (2, 1, 3),
    "] again": (2, 1, 4),
    "[": (2, 1, 3),
    "home": (0, 1, 3),
    "left beyond": (0, 1, 3),
    "end": (LAST, 1, 3),
    "right beyond": (LAST, 1, 3),
    "alt left": (LAST, 1, 3),
    "point": (LAST, 1, 3),
    "away": (LAST, 1, 3),
    "click": (4, 1, 3),
    "layer": (4, 1, 3),
    "head": (4, 1, 4),
    "in the map": (5, 1, 4),
    "point at a cell": (5, 1, 4),
    "away again": (5, 1, 4),
    "in a select": (5, 1, 4),
    "in the heads": (5, 0, 4),
    "click a head": (5, 2, 3),
    "point at the lens": (5, 2, 3),
    "point at a heading": (5, 2, 3),
    "click the lens": (7, 0, 3),
    "shade by probability": (7, 0, 3),
    "shade by loss": (7, 0, 3),
    "shade by attention": (7, 0, 3),
    "hotter": (7, 0, 3),
    "as it is": (7, 0, 3),
    "address": (5, 2, 1),
}
# A token under the mouse is shown, though another is chosen.
POINTED = {"point": 2, "point at a cell": 6, "point at the lens": 7, "point at a heading": 3}


def to_three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def test_what_is_chosen(driven, explanation):
    assert len(explanation.ids) == COUNT
    assert [look["step"] for look in driven["seen"]] == [*STEPS]
    for look, (token, layer, head) in zip(driven["seen"], STEPS.values(), strict=True):
        assert look["address"] == f"#token={token}&layer={layer}&head={head}"
        assert look["selects"] == [str(layer), str(head)]
        assert look["selected"] == look["stops"] == [token]
        name = explanation.labels[explanation.ids[token]]
        assert look["status"] == f"token {token} {name}, layer {layer}, head {head}"
    # The focus is on the chosen token from the start, and goes with it.
    for look, (token, _, _) in zip(driven["seen"][:15], STEPS.values(), strict=False):
        assert look["focus"] == str(token)


def test_every_number_shown_is_the_api_s(driven, model, cache, explanation):
    labels, ids = explanation.labels, explanation.ids
    log_probs = logit_lens(model, TEXT)[0]
    probabilities = predict(model, TEXT).token_probabilities

    def likeliest(depth: int, token: int) -> list[list[object]]:
        best = log_probs[depth, token].topk(5)
        scores = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
        return [[labels[id_], pytest.approx(value, rel=6e-3)] for id_, value in scores]

    for look in driven["seen"]:
        chosen, layer, head = STEPS[look["step"]]
        token = POINTED.get(look["step"], chosen)
        facts = {"position": str(token), "id": str(ids[token])}
        assert look["facts"].items() >= facts.items()
        if token:
            shown = float(look["facts"]["probability"])
            assert shown == pytest.approx(float(probabilities[token - 1]), rel=6e-3)
            assert look["facts"]["rank"] == str(explanation.ranks[token])
        else:
            assert look["facts"] == facts
        assert look["title"] == f"The token {labels[ids[token]]}"
        if look["step"] != "hotter":
            assert look["next"] == likeliest(-1, token)
        assert look["earlyTitle"] == f"Its next token after layer {layer}"
        assert look["early"] == likeliest(layer + 1, token)
        assert look["attendsTitle"] == f"Layer {layer}, head {head} attends to"
        pattern = cache["pattern", layer, "attn"][head]
        exact = pattern[token]
        if not look["step"].startswith("shade by"):
            assert look["shades"] == pytest.approx(exact.tolist(), abs=5.01e-4)
        attended = {int(name.split(" ", 1)[0]): weight for name, weight in look["attends"]}
        for name, _ in look["attends"]:
            position, label = name.split(" ", 1)
            assert label == labels[ids[int(position)]]
        most = exact.sort(descending=True).values[: len(attended)].tolist()
        assert len(attended) == min(5, token + 1)
        assert [*attended.values()] == pytest.approx(most, abs=5.01e-4)
        for position, weight in attended.items():
            assert weight == pytest.approx(float(exact[position]), abs=5.01e-4)
        query, key = torch.tril_indices(len(ids), len(ids))
        assert look["map"] == pytest.approx(pattern[query, key].tolist(), abs=5.01e-4)


def test_tokens_are_shaded_by_probability_or_loss(driven, explanation):
    looks = {look["step"]: look["shades"] for look in driven["seen"]}
    _, *probabilities = explanation.probabilities
    assert looks["shade by probability"] == pytest.approx([0, *probabilities])
    losses = [min(1, -math.log(probability) / 10) for probability in probabilities]
    assert looks["shade by loss"] == pytest.approx([0, *losses], abs=1e-6)
    assert looks["shade by attention"] == looks["click the lens"]


def test_the_next_tokens_at_a_higher_temperature(driven, model, explanation):
    [look] = [look for look in driven["seen"] if look["step"] == "hotter"]
    with torch.no_grad():
        heated = (model(model.to_tokens(TEXT))[0, 7] / 2.0).softmax(dim=-1)
    for (label, value), (id_, _) in zip(look["next"], explanation.lens[-1][7], strict=True):
        assert label == explanation.labels[id_]
        assert value == pytest.approx(float(heated[id_]), rel=6e-3)


def test_what_the_mouse_is_told(driven, cache, explanation):
    looks = {look["step"]: look for look in driven["seen"]}
    names = [explanation.labels[id_] for id_ in explanation.ids]
    tip = looks["point at a cell"]["tip"]
    assert tip.startswith(f"{names[6]} attends to {names[3]}weight")
    weight = float(cache["pattern", 1, "attn"][4, 6, 3])
    assert float(tip.rsplit("weight", 1)[1]) == pytest.approx(weight, abs=5.01e-4)
    lens = explanation.lens[1][7]
    told = "".join(
        f"{explanation.labels[id_]}{to_three_digits(probability):g}" for id_, probability in lens
    )
    assert looks["point at the lens"]["tip"] == f"after layer 0, what follows {names[7]}{told}"
    assert looks["point at a heading"]["tip"] is None


def test_the_table_of_the_lens(driven, explanation):
    names = [explanation.labels[id_] for id_ in explanation.ids]
    assert driven["headings"] == names
    following = [*explanation.ids[1:], None]
    assert any(follows for row in driven["rows"] for _, _, follows in row)
    for row, scores in zip(driven["rows"], explanation.lens, strict=True):
        assert row == [
            [explanation.labels[id_], probability, id_ == after]
            for [[id_, probability], *_], after in zip(scores, following, strict=True)
        ]
    first, *bars = driven["titles"]
    assert first == ""
    assert [*map(float, bars)] == [
        to_three_digits(probability) for probability in explanation.probabilities[1:]
    ]


def test_every_head_is_drawn(driven, cache):
    patterns = torch.stack([cache["pattern", layer, "attn"] for layer in range(3)])
    ink, empty = torch.tensor([0x1F, 0x5F, 0xAE]), torch.tensor([0xED, 0xF0, 0xF4])
    colors = torch.lerp(empty.float(), ink.float(), patterns.sqrt()[..., None])
    # Half a thousandth more or less is up to 5 of 255 where there is next to nothing.
    torch.testing.assert_close(torch.tensor(driven["heads"]).float(), colors, rtol=0, atol=6)


def test_an_error_in_a_page_would_be_seen(driven, page, tmp_path: Path):
    _, console = browsed(page.replace('"use strict";', '"use strict"; nothing();'), tmp_path)
    assert len(console) == 1
