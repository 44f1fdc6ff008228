"""The page says what the JSON says, to every reader, on a machine without a network."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.healthy_settings import threads
from clean_transformer.cli import app
from clean_transformer.parity import inputs, suite
from clean_transformer.parity.locate import Located
from clean_transformer.parity.operations import probes
from clean_transformer.parity.report.json import to_json
from clean_transformer.parity.report.page import render, write_html
from clean_transformer.parity.report.wording import describe, group_of
from clean_transformer.parity.results import SuiteReport
from clean_transformer.parity.same_function import Comparison, ParityReport
from clean_transformer.parity.suite import run_suite
from clean_transformer.parity.verdict import Verdict

from ...pages import CHROMIUM, Element, Page, assert_self_contained, browse, facts, same_number
from ..small import model_only, small_weights

ONE_PROBE = probes.PROBES[:1]
MARKUP = """<b onclick="x('y')">&amp;</b>"""


@pytest.fixture(scope="module")
def measured() -> SuiteReport:
    """A real report: a CPU that is healthy, and a device that most machines do not have."""
    weights = small_weights(n_layers=3, d_model=64, d_head=32, d_mlp=128, d_vocab=300)
    devices, dtypes = ["cpu", "mps"], ["float32", "bfloat16"]
    with model_only(), pytest.MonkeyPatch.context() as few, threads(1):
        few.setattr(probes, "PROBES", ONE_PROBE)
        return run_suite(weights, devices, dtypes, reference=None, no_reference="no reference here")


@pytest.fixture(scope="module")
def broken(measured: SuiteReport) -> SuiteReport:
    """The same with a fault of every sort."""
    first, *others = measured.runs
    query = "blocks.1.attn.hook_q"
    isolated = [
        replace(row, ratio=1e5, bits=3.25, per_head=(2.0, 1e5)) if row.name == query else row
        for row in first.isolated
    ]
    isolated = [
        replace(row, ratio=math.inf, bits=-math.inf) if row.name == "blocks.2.mlp" else row
        for row in isolated
    ]
    errors = {"blocks.2.hook_resid_mid": math.inf, "blocks.2.hook_resid_post": math.nan}
    end_to_end = [
        replace(row, error=errors.get(row.name, row.error), reference_error=3 * row.envelope)
        for row in first.end_to_end
    ]
    checks = [replace(check, verdict=Verdict.WRONG, note=MARKUP) for check in first.invariants]
    run = replace(
        first,
        isolated=isolated,
        end_to_end=end_to_end,
        invariants=checks,
        probes=[replace(first.probes[0], verdict=Verdict.WRONG, note=MARKUP), *first.probes[1:]],
        located=Located(
            where="blocks.1.attn.hook_q",
            operation="aten.linear",
            operands=("float32 [2, 33, 64]", "float32 [64, 64]"),
            ratio=1e5,
            bits=3.25,
            diagnosis="wrong only when the weight is not contiguous",
            known=(f"linear returns garbage {MARKUP}",),
            script='assert x < 3 and "quotes" & y\n',
        ),
    )
    rows = [
        Comparison("hook_embed", "hook_embed", 0.0, 1.5, 1e-12),
        Comparison("blocks.0.attn.hook_q", "blocks.0.attn.hook_q", 3e-3, 1.5, 1e-12),
        Comparison("blocks.0.attn.hook_k", "blocks.0.attn.hook_k", 3e-14, 1.5, 1e-12),
        Comparison("blocks.1.hook_rot", "", 0.0, 0.0, 1e-12, note=MARKUP),
    ]
    return replace(
        measured, weights=MARKUP, runs=[run, *others], same_function=ParityReport("theirs", rows)
    )


@pytest.fixture(params=["measured", "broken"])
def report(request: pytest.FixtureRequest) -> SuiteReport:
    return request.getfixturevalue(request.param)


def run_sections(page: Element) -> list[Element]:
    return page.all("class", "run")


def badness(row: dict[str, Any]) -> tuple[int, float]:
    ratio, healthy = float(row["ratio"]), float(row["healthy"])
    share = ratio / healthy if healthy else math.inf if ratio else 0.0
    return [verdict.value for verdict in Verdict].index(row["verdict"]), share


# --- the numbers are the JSON's ---


def test_every_isolated_square(report: SuiteReport):
    plain = to_json(report)
    page = Page(render(report)).root
    for section, run in zip(run_sections(page), plain["runs"], strict=True):
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in run["isolated"]:
            rows.setdefault(row["name"] or "logits", []).append(row)
        squares = {} if run["not_checked"] else facts(section.all("class", "isolated")[0])
        assert squares.keys() == rows.keys()
        for name, told in squares.items():
            worst = max(map(badness, rows[name]))
            candidates = [row for row in rows[name] if badness(row) == worst]
            (row,) = [
                row
                for row in candidates
                if (told["case"], told["path"]) == (row["case"], row["path"])
            ]
            assert told["verdict"] == row["verdict"]
            assert told["operation"] == row["operation"]
            assert same_number(told["ratio"], row["ratio"])
            assert same_number(told["healthy"], row["healthy"])
            assert same_number(told["bits"], row["bits"])
            assert told["index"] == ", ".join(map(str, row["worst_index"]))
            assert told["precision"] == row["lower_precision"]
            if row["per_head"]:
                assert row["per_head"][int(told["head"])] == max(row["per_head"])
            else:
                assert told["head"] == ""


def test_every_end_to_end_square(report: SuiteReport):
    plain = to_json(report)
    for section, run in zip(run_sections(Page(render(report)).root), plain["runs"], strict=True):
        rows = {row["name"]: row for row in run["end_to_end"]}
        squares = {} if run["not_checked"] else facts(section.all("class", "end-to-end")[0])
        assert squares.keys() == rows.keys()
        for name, told in squares.items():
            row = rows[name]
            assert told["verdict"] == row["verdict"]
            for key in ("rho", "healthy", "error", "envelope"):
                assert same_number(told[key], row[key])
            theirs = row["reference_error"]
            assert (
                told["reference"] == ""
                if theirs is None
                else same_number(told["reference"], theirs)
            )


def test_every_point_of_the_chart(report: SuiteReport):
    plain = to_json(report)
    for section, run in zip(run_sections(Page(render(report)).root), plain["runs"], strict=True):
        rows = {row["name"]: row for row in run["end_to_end"] if "hook_resid" in row["name"]}
        points = {} if run["not_checked"] else facts(section.all("class", "chart")[0])
        assert [*points] == [*rows]
        for name, told in points.items():
            row = rows[name]
            assert same_number(told["ours"], row["error"])
            assert same_number(told["envelope"], row["envelope"])
            assert same_number(told["allowed"], row["healthy"] * float(row["envelope"]))
            if row["reference_error"] is not None:
                assert same_number(told["reference"], row["reference_error"])
            else:
                assert "reference" not in told


def test_higher_on_the_chart_is_a_larger_error(measured: SuiteReport):
    section = run_sections(Page(render(measured)).root)[0]
    line = next(e for e in section.all("class", "ours") if e.tag == "polyline")
    heights = [-float(point.split(",")[1]) for point in line.attributes["points"].split()]
    residual = [row for row in measured.runs[0].end_to_end if "hook_resid" in row.name]
    by_height = sorted(range(len(residual)), key=lambda i: (heights[i], residual[i].error))
    by_error = sorted(residual, key=lambda row: row.error)
    assert [residual[i].error for i in by_height] == [row.error for row in by_error]


def test_tables(report: SuiteReport):
    plain = to_json(report)
    page = Page(render(report)).root
    for section, run in zip(run_sections(page), plain["runs"], strict=True):
        checks = {row.attributes["data-invariant"]: row for row in section.all("data-invariant")}
        assert [*checks] == [check["name"] for check in run["invariants"]]
        for check in run["invariants"]:
            _, measured, allowed, note, verdict = checks[check["name"]].children
            assert same_number(measured.text, check["measured"], 3)
            assert same_number(allowed.text.removeprefix("≤ "), check["allowed"], 3)
            assert note.text == check["note"]
            assert verdict.words() == check["verdict"]
        kinds = {row.attributes["data-kind"]: row for row in section.all("data-kind")}
        assert kinds.keys() == {row["operation"] for row in run["isolated"]}
        for name, row in kinds.items():
            same = [row for row in run["isolated"] if row["operation"] == name]
            worst = max(same, key=badness)
            _, count, ratio, healthy, _, verdict = row.children
            assert int(count.text) == len(same)
            assert same_number(ratio.text, worst["ratio"], 3)
            assert same_number(healthy.text.removeprefix("≤ "), worst["healthy"])
            assert verdict.words() == worst["verdict"]
        if run["impact"]:
            flips = f"{run['impact']['top1_flips']} of {run['impact']['positions']} most likely"
            assert flips in section.words()


def test_the_first_question(broken: SuiteReport):
    plain = to_json(broken)
    page = Page(render(broken)).root
    (section,) = page.all("id", "same-function")
    assert "3 of its 4" in section.words()
    table = {row.attributes["data-place"]: row for row in section.all("data-place")}
    rows = plain["same_function"]["rows"]
    assert table.keys() == {group_of(row["key"]) for row in rows}
    for place, row in table.items():
        same = [row for row in rows if group_of(row["key"]) == place]
        largest = max(same, key=lambda row: row["error"])
        _, compared, error, key, _ = row.children
        assert compared.text == f"{sum(bool(row['name']) for row in same)} of {len(same)}"
        assert same_number(error.text, largest["error"], 3)
        assert key.children[0].text == largest["key"]
    assert table["block 0"].children[-1].words() == "WRONG"
    assert f"NOT CHECKED blocks.1.hook_rot {MARKUP}" in section.words()


def test_verdicts_in_words(report: SuiteReport):
    plain = to_json(report)
    page = Page(render(report)).root
    (top,) = page.all("id", "top")
    assert top.attributes["data-verdict"] == plain["verdict"]
    assert top.words().startswith(plain["verdict"])
    for section, run in zip(run_sections(page), plain["runs"], strict=True):
        assert section.children[0].words().endswith(run["verdict"])
    linked = [e for e in page.all("href") if e.attributes["href"].startswith("#run-")]
    matrix = [e.words() for e in linked][-len(plain["runs"]) :]
    assert matrix == [run["verdict"] for run in plain["runs"]]


# --- what is wrong, and what was not checked ---


def test_reasons_why_something_was_not_checked(measured: SuiteReport):
    page = Page(render(measured)).root
    (top,) = page.all("id", "top")
    assert "not everything was checked" in top.words()
    assert "no reference here" in top.words()
    assert "no reference here" in page.all("id", "same-function")[0].words()
    for section, run in zip(run_sections(page), measured.runs, strict=True):
        if run.not_checked:
            assert run.not_checked in section.words()
            assert run.not_checked in top.words()


def test_the_first_bad_activation(broken: SuiteReport):
    page = Page(render(broken)).root
    words = run_sections(page)[0].words()
    sentence = describe(broken.runs[0].first_failure)
    assert sentence.startswith("blocks.1.attn.hook_q ")
    assert f"First failure WRONG {sentence}." in words
    assert "The reference itself is inaccurate" in words
    assert "First at blocks.1.attn.hook_q." in page.all("id", "top")[0].words()


def test_a_bad_square_has_a_letter(broken: SuiteReport):
    squares = run_sections(Page(render(broken)).root)[0].all("data-facts")
    for square in squares:
        if "square" in square.attributes.get("class", "").split():
            verdict = square.attributes["data-facts"].split("|")[1]
            assert square.text == {"PASS": "", "DEGRADED": "D", "WRONG": "W"}[verdict]


def test_the_operation(measured: SuiteReport, broken: SuiteReport):
    assert not Page(render(measured)).root.all("class", "finding")
    plain = to_json(broken)
    (card,) = Page(render(broken)).root.all("class", "finding")
    located = plain["runs"][0]["located"]
    texts = ("operation", "where", "diagnosis")
    for text in (*(located[key] for key in texts), *located["operands"], *located["known"]):
        assert text in card.words()
    (script,) = [element for element in card.walk() if element.tag == "pre"]
    assert script.text == located["script"]


def test_single_operations_that_do_not_pass(broken: SuiteReport):
    (first, *_), run = run_sections(Page(render(broken)).root), broken.runs[0]
    bad = [probe for probe in run.probes if probe.verdict is not Verdict.PASS]
    shown = first.all("data-probe")
    assert [row.attributes["data-probe"] for row in shown] == [probe.name for probe in bad]
    for row, probe in zip(shown, bad, strict=True):
        _, ratio, note, verdict = row.children
        assert same_number(ratio.text, probe.measured, 3)
        assert (note.text, verdict.words()) == (probe.note, probe.verdict.value)
    total = len(run.probes)
    assert f"{total - len(bad)} of {total} pass" in first.words()


def test_a_compiled_run_is_named_and_needs_no_chart(measured: SuiteReport):
    whole = [row for row in measured.runs[0].end_to_end if "hook_" not in row.name]
    run = replace(measured.runs[0], mode="compiled", end_to_end=whole)
    section = run_sections(Page(render(replace(measured, runs=[run]))).root)[0]
    assert "compute float32, compiled accurately?" in section.words()
    assert not section.all("class", "chart")
    assert facts(section.all("class", "end-to-end")[0]).keys() == {row.name for row in whole}


# --- one file, and nothing else ---


def test_no_network(report: SuiteReport):
    text = render(report)
    assert_self_contained(text)
    page = Page(text).root
    names = {element.attributes["id"] for element in page.all("id")}
    assert {e.attributes["href"].removeprefix("#") for e in page.all("href")} <= names


def test_everything_is_escaped(broken: SuiteReport):
    text = render(broken)
    assert "<b onclick" not in text
    page = Page(text).root
    assert f"Measured on {MARKUP}" in page.words()
    assert not [e for e in page.walk() if any(name.startswith("on") for name in e.attributes)]


def test_the_file_is_written_whole(measured: SuiteReport, tmp_path: Path):
    file = tmp_path / "page.html"
    file.write_text("before")
    write_html(measured, file)
    assert file.read_text(encoding="utf-8") == render(measured)
    assert [*tmp_path.iterdir()] == [file]


def test_the_command_writes_it(
    measured: SuiteReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inputs, "choose_weights", lambda source: small_weights())
    monkeypatch.setattr(suite, "run_suite", lambda *args, **options: measured)
    file = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["parity", "--reference", "none", "--html", str(file)])
    assert result.exit_code == 3, result.output
    assert file.read_text(encoding="utf-8") == render(measured)


@pytest.mark.parametrize(
    ("layers", "runs", "megabytes"),
    [(12, 4, 0.7), pytest.param(48, 3, 1.5, marks=pytest.mark.slow)],
)
def test_size(measured: SuiteReport, layers: int, runs: int, megabytes: float):
    run = measured.runs[0]
    deep = replace(
        run,
        isolated=deeper(run.isolated, layers),
        end_to_end=deeper(run.end_to_end, layers),
    )
    text = render(replace(measured, runs=[deep] * runs))
    assert len(text.encode()) < megabytes * 1e6
    for section in run_sections(Page(text).root):
        told = facts(section.all("class", "isolated")[0])
        assert sum(name.endswith("attn.hook_q") for name in told) == layers


def deeper(rows: list[Any], layers: int) -> list[Any]:
    """The rows of a model with more blocks like the second."""
    more = []
    for row in rows:
        more.append(row)
        if row.name.startswith("blocks.1."):
            rest = row.name.removeprefix("blocks.1.")
            more += [replace(row, name=f"blocks.{layer}.{rest}") for layer in range(3, layers)]
    return more


# --- in a browser ---


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_in_a_browser_without_a_network(broken: SuiteReport, tmp_path: Path):
    file = tmp_path / "page.html"
    write_html(broken, file)
    document, console = browse(file, tmp_path / "profile")
    assert console == []
    shown, written = Page(document).root, Page(file.read_text(encoding="utf-8")).root
    for ours, theirs in zip(run_sections(written), run_sections(shown), strict=True):
        assert facts(ours) == facts(theirs)
    # The script has run: every figure can be reached with the keyboard.
    for figure in shown.all("data-fields"):
        assert len(figure.all("tabindex", "0")) == 1

    bad = file.read_text(encoding="utf-8").replace(
        '"use strict";', '"use strict"; console.error(1);'
    )
    file.write_text(bad.replace("</main>", '<img src="https://example.org/x.png"></main>'))
    _, console = browse(file, tmp_path / "profile")
    assert len(console) == 2


def test_a_long_fact_about_the_machine_has_a_line_of_its_own(measured: SuiteReport) -> None:
    report = replace(measured, environment={"torch": "2.13.0", "build": "USE_CUDA=0 " * 9})
    [wide] = Page(render(report)).root.all("class", "wide")
    assert wide.children[0].text == "build"
