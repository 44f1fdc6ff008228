"""The terminal, the JSON, the page and `assert_parity` name the same first failure."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.assertion import assert_parity
from clean_transformer.parity.faults import inject
from clean_transformer.parity.report.json import to_json
from clean_transformer.parity.report.page import render
from clean_transformer.parity.report.terminal import print_report
from clean_transformer.parity.results import DeviceRun, SuiteReport, by_activation
from clean_transformer.parity.same_function import Comparison, ParityReport
from clean_transformer.parity.suite import run_suite
from clean_transformer.parity.verdict import SAME_FUNCTION, Check, Verdict

from ...pages import Page
from ..small import model_only, small_model, small_weights

WEIGHTS = small_weights(d_vocab=300, n_ctx=16)
# Softmax comes first in the forward pass. Only the explicit path computes it by itself, and the
# suite takes that path after the fused one, in which GELU is the first to fail.
FIRST = "blocks.0.attn.hook_pattern"


@pytest.fixture(scope="module")
def two_faults() -> SuiteReport:
    with model_only(), inject("softmax-unnormalized"), inject("gelu-tanh-ignored"):
        return run_suite(WEIGHTS, ["cpu"], ["float32"], reference=None)


def printed(report: SuiteReport) -> str:
    file = io.StringIO()
    print_report(report, Console(file=file, width=300))
    return file.getvalue()


def summary(report: SuiteReport) -> str:
    (top,) = Page(render(report)).root.all("id", "top")
    return top.words()


def test_everybody_names_the_same_first_failure(two_faults: SuiteReport) -> None:
    (run,) = two_faults.runs
    assert {row.operation for row in run.isolated if row.verdict is Verdict.WRONG} == {
        "softmax",
        "gelu_new",
    }
    text = printed(two_faults)
    assert re.search(r"Where does it first go wrong\?\s+(\S+) ", text)[1] == FIRST
    assert re.search(r"aten\.(\S+), in (\S+):", text).groups() == ("_softmax.default", FIRST)
    (plain,) = to_json(two_faults)["runs"]
    assert plain["first_failure"]["name"] == plain["located"]["where"] == FIRST
    assert f"First at {FIRST}." in summary(two_faults)
    card = Page(render(two_faults)).root.all("class", "wrong-card")[0]
    assert card.words().startswith(f"First failure WRONG {FIRST} (softmax; ")

    tokens = small_model(WEIGHTS).embed.W_E.new_zeros((1, 5)).long()
    with (
        inject("softmax-unnormalized"),
        inject("gelu-tanh-ignored"),
        pytest.raises(AssertionError) as failure,
    ):
        assert_parity(small_model(WEIGHTS), tokens, device="cpu")
    assert f"WRONG: {FIRST} (softmax; " in str(failure.value)
    assert f"aten._softmax.default, in {FIRST}" in str(failure.value)


def row(name: str, ratio: float, case: str = "all", path: str = "fused") -> Isolated:
    return Isolated(name, case, path, "linear", ratio, 30.0, 100.0, ratio, 24.0, (0,))


def test_the_case_that_watches_the_most_decides_the_order() -> None:
    rows = [row("a", 1.0), row("c", 999.0)]
    rows += [row("b", 50.0, "block"), row("c", 999.0, "block")]
    rows += [row(name, 1.0, path="per head") for name in "abc"]
    assert [*by_activation(rows)] == ["a", "b", "c"]
    assert by_activation(rows)["c"] == [rows[1], rows[3], rows[6]]
    assert DeviceRun("cpu", "float32", isolated=rows).first_failure == rows[2]


DRIFT = EndToEnd("blocks.0.hook_resid_mid", 5.0, 1.0, 2.0)
EVERYTHING = DeviceRun(
    "cpu",
    "float32",
    isolated=[row("a", 1.0), row("b", 50.0)],
    end_to_end=[EndToEnd("hook_embed", 1.0, 1.0, 2.0), DRIFT],
    invariants=[Check("causality", Verdict.WRONG, 1.0, 0.5, "too much")],
    probes=[Check("gelu, offset", Verdict.WRONG, 99.0)],
)


@pytest.mark.parametrize(
    ("passed", "first", "says"),
    [
        ([], EVERYTHING.isolated[1], "First at b"),
        (["isolated"], DRIFT, "Drifts end to end, first at blocks.0.hook_resid_mid"),
        (["isolated", "end_to_end"], EVERYTHING.invariants[0], "Breaks causality"),
        (
            ["isolated", "end_to_end", "invariants"],
            EVERYTHING.probes[0],
            "Wrong in single operations, first gelu, offset",
        ),
    ],
)
def test_own_errors_come_before_drift_and_drift_before_checks(
    passed: list[str], first: Isolated | EndToEnd | Check, says: str
) -> None:
    without = {part: [] for part in passed if part != "end_to_end"}
    run = replace(EVERYTHING, **without)
    if "end_to_end" in passed:
        run = replace(run, end_to_end=EVERYTHING.end_to_end[:1])
    assert run.first_failure == first
    report = SuiteReport("weights", WEIGHTS.cfg, (1, 2), {}, None, "no reference", [run])
    assert says in summary(report)
    assert f"Where does it first go wrong?  {first.name}" in printed(report)
    assert to_json(report)["runs"][0]["first_failure"]["name"] == first.name


def test_everybody_names_the_same_first_difference_of_the_function() -> None:
    """NOT CHECKED comes first, and WRONG is worse. The last row has the largest error."""
    rows = [
        Comparison(key, name, error, 1.0, SAME_FUNCTION)
        for key, name, error in [("a", "", 0.0), ("b", "b", 0.1), ("c", "c", 0.5)]
    ]
    same = ParityReport("theirs", rows)
    report = SuiteReport("weights", WEIGHTS.cfg, (1, 2), {}, same, "", [])
    assert same.first_failure == rows[1]
    assert to_json(report)["same_function"]["first_failure"]["key"] == "b"
    assert "2 of 3 activations, first b" in summary(report)
    assert "First failure: b\n" in re.sub(r" +\n", "\n", printed(report))
    unchecked = replace(report, same_function=ParityReport("theirs", rows[:1]))
    assert unchecked.same_function.first_failure == rows[0]
    assert ParityReport("theirs", []).first_failure is None
