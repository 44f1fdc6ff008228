"""What a verdict means for a person, in words, before any number."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.modes import MODES
from clean_transformer.parity.report.page import render
from clean_transformer.parity.report.terminal import print_diagnosis, print_report
from clean_transformer.parity.report.wording import ANOTHER_FUNCTION, DRIFT_ONLY, meaning
from clean_transformer.parity.results import DeviceRun, SuiteReport
from clean_transformer.parity.same_function import Comparison, ParityReport
from clean_transformer.parity.uses.judge import UseResult
from clean_transformer.parity.uses.table import Use
from clean_transformer.parity.verdict import Check, Verdict

from ...pages import Page
from ..small import small_weights

CFG = small_weights().cfg
GOOD = Isolated("ln_final", "", "use", "layer norm", 1.0, 30.0, 300.0, 1.0, 24.0, (0,))
BAD, WORSE = replace(GOOD, ratio=40.0), replace(GOOD, ratio=1e9)
FAILED = Check("generate, 1 × 64 tokens", Verdict.ERROR, note="RuntimeError: [no] cache")
ABSENT = Check("beams", Verdict.NOT_CHECKED, note="NotImplementedError: index_select")
DRIFT = EndToEnd("logits", 3.0, 1.0, 2.0)


def use(name: str, means: str, row: Isolated | Check = GOOD, wrong_from: int | None = None):
    return UseResult(Use(name, means, 1, (64,)), (row,), wrong_from)


FORWARD = use("forward", "reading short texts")
LONG = use("long text", "reading texts of 1024 tokens", WORSE, 512)
PADDED = use("unequal batch", "reading a padded batch", WORSE, 5)
GENERATE = use("generate", "generating text", FAILED)
BEAMS = use("beams", "beam search", ABSENT)


def run(*uses: UseResult, **fields) -> DeviceRun:
    return DeviceRun("mps", "float32", uses=[*uses], isolated=[GOOD], **fields)


RUNS = [
    (
        # Tokens are generated after a few lengths only, so the lengths between are unknown.
        run(FORWARD, use("generate", "generating text", WORSE, 64)),
        "Wrong: generating text (of the positions checked, those from 64 on are wrong). Right: "
        "reading short texts.",
    ),
    (
        run(FORWARD, LONG),
        "Wrong: reading texts of 1024 tokens (texts longer than 512 tokens are wrong, shorter ones "
        "are right). Right: reading short texts.",
    ),
    (
        run(FORWARD, PADDED, GENERATE, BEAMS),
        "Wrong: reading a padded batch (of the positions checked, those from 5 on are wrong). "
        "Failed with an exception: generating text. Not checked: beam search. Right: reading short "
        "texts.",
    ),
    (
        run(use("forward", "reading short texts", BAD)),
        "Less accurate than it should be: reading short texts.",
    ),
    (
        run(FORWARD, probes=[Check("topk 9, contiguous", Verdict.WRONG, 99.0)]),
        "Wrong: single operations in other sizes or layouts than GPT-2's (topk 9). Right: reading "
        "short texts.",
    ),
    (
        run(FORWARD, end_to_end=[DRIFT]),
        f"Less accurate than it should be: reading short texts. {DRIFT_ONLY}",
    ),
    (
        run(FORWARD, errors=[Check("isolated, 2 × 33 tokens, explicit", Verdict.ERROR, note="no")]),
        "Failed with an exception: watching and patching activations. Right: reading short texts.",
    ),
    (
        run(FORWARD, errors=[Check("end to end", Verdict.ERROR, note="out of memory (…)")]),
        "Failed with an exception: reading short texts.",
    ),
    (
        DeviceRun("mps", "float64", not_checked="mps has no float64"),
        "Nothing was checked: mps has no float64.",
    ),
    (run(FORWARD), ""),
]


@pytest.mark.parametrize(("run", "says"), RUNS)
def test_what_a_run_means(run: DeviceRun, says: str) -> None:
    assert meaning(run) == says


def printed(show, *args, width: int) -> str:
    file = io.StringIO()
    show(*args, Console(file=file, width=width))
    assert max(map(len, file.getvalue().splitlines())) <= width
    return " ".join(file.getvalue().split())


MODE_RUNS = [(replace(RUNS[1][0], mode=mode), RUNS[1][1]) for mode in MODES]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("run", "says"), [*(pair for pair in RUNS if pair[1]), *MODE_RUNS])
def test_the_meaning_comes_before_any_number(run: DeviceRun, says: str, width: int) -> None:
    report = SuiteReport("weights", CFG, (2, 33), {"torch": "2.13"}, None, "no reference", [run])
    told = printed(print_report, report, width=width)
    assert told.startswith("PyTorch 2.13 ")
    assert told.index(says) < told.index("2. Does mps compute")
    (top,) = Page(render(report)).root.all("id", "top")
    assert says in top.words()
    spoken = printed(print_diagnosis, run, "weights", width=width)
    assert spoken.startswith(f"mps in {run.dtype}: PyTorch ")
    if run.not_checked:
        assert f"NOT CHECKED mps: {run.not_checked}" in spoken
    else:
        assert spoken.index(says) < re.search(r"\d+ checks:", spoken).start()
    for use in run.by_use:
        assert use.reason in spoken


def test_another_function_in_words() -> None:
    same = ParityReport("theirs", [Comparison("a", "a", 0.1, 1.0, 1e-12, case="2 × 33 tokens")])
    report = SuiteReport("weights", CFG, (2, 33), {"torch": "2.13"}, same, "", [])
    told = printed(print_report, report, width=80)
    assert told.index(ANOTHER_FUNCTION) < told.index("1. Is it the same function?")
    assert "First failure: a, 2 × 33 tokens" in told
    (top,) = Page(render(report)).root.all("id", "top")
    assert ANOTHER_FUNCTION in top.words()
