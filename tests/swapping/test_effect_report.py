"""The terminal, the JSON and the page say the same of what a swap changes."""

import io
import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from rich.console import Console
from torch import Tensor, nn

from benchmarks.healthy_settings import threads
from clean_transformer.analysis.comparison import Impact
from clean_transformer.reports.page import in_words
from clean_transformer.swapping.effect_report import (
    BARS,
    COLORS,
    SCHEMA,
    SIZES,
    Change,
    Effect,
    introduced_map,
    notes,
    print_effect,
    render,
    square,
    to_json,
    total_map,
    write_html,
    write_json,
)
from clean_transformer.swapping.effects import effect
from clean_transformer.swapping.swapped import Swapped
from clean_transformer.swapping.swaps import HookPointsLost, swap

from ..helpers import random_model, random_tokens, tiny
from ..pages import CHROMIUM, Element, Page, assert_self_contained, browse, facts, same_number

MARKUP = """<b onclick="x('y')">&amp;</b>"""


class Halved(nn.Module):
    """A module without a hook point."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.fixture(scope="module")
def measured() -> Effect:
    """Attention without hook points in two layers of four."""
    model = random_model(tiny(n_layers=4))
    with pytest.warns(HookPointsLost):
        swapped = swap(model, "blocks.[1-2].attn", Halved())
    with threads(1):
        return effect(model, swapped, random_tokens(), MARKUP)


@pytest.fixture(scope="module")
def odd(measured: Effect) -> Effect:
    """The same with numbers that are none, in places outside of the blocks too."""
    rows = {row.name: row for row in measured.rows}
    sizes = {"scale": 0.0, "total": math.inf, "introduced": math.inf, "inherited": 0.0}
    rows["hook_embed"] = Change("hook_embed", "embed", **sizes)
    sizes = {"scale": 1.0, "total": math.nan, "introduced": math.nan, "inherited": 2e-7}
    rows["logits"] = Change("logits", "unembed", **sizes, note="what the module gives")
    return replace(
        measured,
        rows=[*rows.values()],
        swapped=[Swapped("embed", "Embed", "Mine"), Swapped("unembed", "Unembed", "Mine")],
        impact=Impact(14, 3, math.nan, math.inf),
    )


@pytest.fixture(params=["measured", "odd"])
def report(request: pytest.FixtureRequest) -> Effect:
    return request.getfixturevalue(request.param)


def printed(report: Effect, width: int = 160) -> str:
    file = io.StringIO()
    print_effect(report, Console(file=file, width=width))
    return file.getvalue()


# --- the terminal ---


def test_the_terminal_says_what_was_swapped_then_the_output_then_where(measured: Effect) -> None:
    text = printed(measured)
    felt = measured.impact
    listed = measured.most_introduced[0]
    parts = [
        MARKUP,
        "2 × 7 tokens, float64 on cpu",
        "swapped: Attention → Halved at blocks.1.attn, blocks.2.attn",
        "parameters at blocks.1.attn, blocks.2.attn: left over of the old W_Q, W_K, W_V, W_O, b_Q",
        f"output: {felt.top1_flips} of 14 top-1 predictions flipped, "
        f"KL divergence {felt.kl_divergence:.2g} nats, loss {felt.loss_change:+.2g} nats",
        "first changed: blocks.1.hook_attn_out, by ",
        "0123",
        "attn.hook_q ",
        "·××",
        "logits ",
        "introduced most",
        f"{listed.name} ",
        "attn.hook_q, attn.hook_k, attn.hook_v, attn.hook_attn_scores, attn.hook_pattern",
        "in block 1, 2: only the original model makes it",
    ]
    places = [text.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)


def test_every_row_is_in_the_map(measured: Effect) -> None:
    lines = {line.split()[0]: line.split() for line in printed(measured).splitlines() if line}
    for row in measured.rows:
        name = row.name.split(".", 2)[2] if row.name.startswith("blocks.") else row.name
        assert name in lines
    _, bars, changed, introduced = lines["hook_attn_out"]
    rows = [row for row in measured.rows if row.name.endswith("hook_attn_out")]
    assert bars == "".join(BARS[square(row, row.total).shade] for row in rows)
    assert bars[0] == "·" != bars[1]
    assert same_number(changed, max(row.total for row in rows), 2)
    assert same_number(introduced, max(row.introduced for row in rows), 2)
    assert lines["hook_resid_pre"][1].startswith("··")
    assert len(lines["hook_resid_pre"]) == 3  # nothing there is the new modules' own


def test_without_a_change_it_says_so(measured: Effect) -> None:
    rows = [Change(row.name, row.module, 1.0, 0.0, 0.0, 0.0) for row in measured.rows]
    text = printed(replace(measured, rows=rows))
    assert "no activation changed" in text
    assert "introduced most" not in text
    *lines, _, _ = text.splitlines()  # the last two are the legend
    assert not {*"".join(lines)} & {*BARS[1:]}


def test_a_narrow_terminal_leaves_no_layer_out(measured: Effect) -> None:
    rows = [Change(f"blocks.{layer}.a", "", 1.0, 0.5, 0.0, 0.5) for layer in range(70)]
    table = printed(replace(measured, rows=rows), width=60).rpartition("· ≤ 0")[0]
    assert table.count("▇") == 70


def test_a_larger_change_has_a_higher_bar_and_another_shade() -> None:
    assert len(SIZES) == len(BARS) == len(COLORS) == 12
    assert list(BARS) == sorted(BARS)
    sizes = (0.0, 1e-17, 1e-6, 1.1e-6, 0.05, 0.3, 1.0, 1.1, 1e6, math.inf)
    shades = [square(Change("a", ""), size).shade for size in sizes]
    assert shades == [0, 1, 1, 2, 8, 9, 10, 11, 11, 11]
    assert square(Change("a", ""), math.nan).shade == 11
    none = square(Change("a", ""), None)
    assert (none.shade, none.mark, none.label) == (0, "×", "×")


def test_many_names_are_told_by_the_first_and_the_last() -> None:
    assert in_words(["a", "b", "c"]) == "a, b, c"
    assert in_words([*"abcde"]) == "a, b, … e (5)"


def test_notes_are_gathered_by_what_they_say_and_of_which_blocks(measured: Effect) -> None:
    rows = [
        *(Change(f"blocks.{n}.a", "", note="one") for n in (0, 1)),
        *(Change(f"blocks.{n}.b", "", note="one") for n in (0, 1)),
        Change("blocks.1.c.d", "", note="one"),
        Change("e", "", note="two"),
        Change("f", ""),
    ]
    assert notes(replace(measured, rows=rows)) == [
        "a, b in block 0, 1: one",
        "c.d in block 1: one",
        "e: two",
    ]


def test_what_is_not_a_number_is_listed_first(odd: Effect) -> None:
    assert [row.name for row in odd.most_introduced[:2]] == ["logits", "hook_embed"]
    assert odd.first_change.name == "hook_embed"


# --- JSON ---


def test_json_has_every_field_and_no_number_that_json_has_not(odd: Effect, tmp_path: Path) -> None:
    file = tmp_path / "effect.json"
    file.write_text("old")
    write_json(odd, file)
    assert [*tmp_path.iterdir()] == [file]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(file.read_text(), parse_constant=refuse)
    assert read == to_json(odd)
    assert (read["schema"], read["version"]) == (SCHEMA.name, 1)
    assert read.keys() == {"schema", "version"} | {field.name for field in fields(Effect)}
    assert read["swapped"][0] == {
        **{"path": "embed", "old": "Embed", "new": "Mine", "looks_ahead": False},
        "parameters": {"copied": [], "new": [], "left_over": []},
    }
    for row, plain in zip(odd.rows, read["rows"], strict=True):
        assert plain.keys() == {field.name for field in fields(Change)}
        for name, value in plain.items():
            own = getattr(row, name)
            assert value == (str(own) if own in (math.inf,) or own != own else own)
    assert read["impact"]["loss_change"] == "inf"


# --- the page ---


def page_of(report: Effect) -> Element:
    return Page(render(report)).root


def test_every_square_tells_the_numbers_of_the_json(report: Effect) -> None:
    rows = {row["name"]: row for row in to_json(report)["rows"]}
    page = page_of(report)
    total = facts(page.all("class", "total")[0])
    introduced = facts(page.all("class", "introduced")[0])
    assert total.keys() == rows.keys()
    assert introduced.keys() == {name for name, row in rows.items() if row["module"]}
    for told in (*total.values(), *introduced.values()):
        row = rows[told["name"]]
        assert (told["module"], told["note"]) == (row["module"], row["note"])
        for size in ("total", "introduced", "inherited", "scale"):
            if row[size] is None:
                assert told[size] == ""
            else:
                assert same_number(told[size], row[size])


def test_squares_without_a_size_are_crossed_out(measured: Effect) -> None:
    squares = page_of(measured).all("data-facts")
    crossed = {e.attributes["data-facts"].split("|")[0] for e in squares if e.text == "×"}
    assert crossed == {row.name for row in measured.rows if row.total is None}
    assert {element.text for element in squares} == {"", "×"}


def test_the_predictions_and_the_places(report: Effect) -> None:
    page, felt = page_of(report), report.impact
    words = page.words()
    for swapped in report.swapped:
        assert f"{swapped.old} → {swapped.new}" in words
        assert swapped.path in words
    (output,) = page.all("id", "output")
    flips, kl, loss, first = (e.text for e in output.walk() if e.tag == "dd")
    assert flips == f"{felt.top1_flips} of {felt.positions}"
    assert same_number(kl.removesuffix(" nats"), felt.kl_divergence, 3)
    assert same_number(loss.removesuffix(" nats"), felt.loss_change, 3)
    assert first == report.first_change.name
    (noted,) = page.all("id", "notes")
    assert [e.text for e in noted.walk() if e.tag == "li"] == notes(report)


def test_the_most_introduced_are_listed(measured: Effect) -> None:
    listed = page_of(measured).all("data-row")
    assert [e.attributes["data-row"] for e in listed] == [
        row.name for row in measured.most_introduced
    ]
    for element, row in zip(listed, measured.most_introduced, strict=True):
        numbers = [cell.text for cell in element.children[1:]]
        sizes = (row.introduced, row.inherited, row.total)
        assert all(map(same_number, numbers, sizes, [3] * 3))


def test_what_is_outside_of_the_blocks_stands_before_or_after_them(odd: Effect) -> None:
    for laid_out in (total_map(odd), introduced_map(odd)):
        assert "hook_embed" in laid_out.before
        assert "logits" in laid_out.after
    outside = [row for row in odd.rows if row.module in ("embed", "unembed") or not row.module]
    laid_out = introduced_map(replace(odd, rows=outside))
    assert ([*laid_out.before], [*laid_out.after]) == (["hook_embed"], ["logits"])
    assert laid_out.layers == []
    assert render(replace(odd, rows=outside))


def test_without_a_note_there_is_no_list_of_them(measured: Effect) -> None:
    same = [replace(row, introduced=0.0, note="") for row in measured.rows if not row.note]
    page = page_of(replace(measured, rows=same))
    assert not page.all("id", "notes")
    assert not page.all("data-row")


def test_it_is_one_file_that_asks_for_nothing(report: Effect, tmp_path: Path) -> None:
    file = tmp_path / "effect.html"
    write_html(report, file)
    assert [*tmp_path.iterdir()] == [file]
    text = file.read_text(encoding="utf-8")
    assert text == render(report)
    assert_self_contained(text)


def test_everything_is_escaped(measured: Effect) -> None:
    assert "<b onclick" not in render(measured)
    assert MARKUP in page_of(measured).words()


def test_it_follows_the_readers_colors(measured: Effect) -> None:
    text = render(measured)
    assert "color-scheme: light dark;" in text
    # Every color is given for light and for dark, and every color that is used is given.
    given = dict(re.findall(r"(--[\w-]+): ([^;]*);", text))
    used = {*re.findall(r"var\((--[\w-]+)\)", text)} - {"--layers"}
    assert used <= given.keys()
    assert all(given[name].startswith(("light-dark(", "var(")) for name in used)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_in_a_browser_without_a_network(odd: Effect, tmp_path: Path) -> None:
    file = tmp_path / "effect.html"
    write_html(odd, file)
    document, console = browse(file, tmp_path / "profile")
    assert console == []
    shown = Page(document).root
    assert facts(shown) == facts(page_of(odd))
    # The script has run: every figure can be reached with the keyboard.
    for figure in shown.all("data-fields"):
        assert len(figure.all("tabindex", "0")) == 1
