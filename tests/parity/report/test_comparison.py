"""Comparing two reports: what changed in the build, and what got worse beyond healthy scatter."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.healthy_settings import threads
from clean_transformer.benchmark.results.file import write_results
from clean_transformer.parity import invariants
from clean_transformer.parity.faults import inject
from clean_transformer.parity.operations import probes
from clean_transformer.parity.report.comparison import (
    BITS,
    Change,
    Comparison,
    Measured,
    Place,
    compare_reports,
)
from clean_transformer.parity.report.json import to_json
from clean_transformer.parity.suite import run_suite
from clean_transformer.parity.uses import every
from clean_transformer.parity.verdict import Verdict

from ...benchmark.made_up import part, result, results
from ...cli.running import assert_one_line, call
from ..small import small_weights

WEIGHTS = small_weights(n_layers=1, d_model=32, d_head=16, d_mlp=64, d_vocab=50, n_ctx=8)
PASS, WRONG, UNCHECKED = Verdict.PASS, Verdict.WRONG, Verdict.NOT_CHECKED


def whole_report() -> dict[str, Any]:
    made = run_suite(WEIGHTS, ["cpu"], ["float32"], reference=None, no_reference="none asked for")
    # As a file has it: with lists for tuples.
    return json.loads(json.dumps(to_json(made)))


def report() -> dict[str, Any]:
    """Like `whole_report`, but with few uses, invariants and single operations."""
    uses = every.uses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(every, "uses", lambda cfg: uses(cfg)[:3])
        patch.setattr(invariants, "INVARIANTS", invariants.INVARIANTS[:1])
        patch.setattr(probes, "PROBES", probes.PROBES[:1])
        return whole_report()


@pytest.fixture(scope="module")
def before() -> dict[str, Any]:
    with threads(2):
        return report()


@pytest.fixture(scope="module")
def faulty() -> dict[str, Any]:
    with inject("gelu-tanh-ignored"):
        return report()


def places(found: Comparison, verdict: str) -> set[tuple[str, str]]:
    return {(one.place.what, one.place.where) for one in found.those(verdict)}


@pytest.mark.slow
def test_two_whole_reports_have_no_changes() -> None:
    with threads(2):
        before = whole_report()
    with threads(1):
        assert_no_changes(before, whole_report())


def test_two_healthy_runs_have_no_changes(before: dict[str, Any]) -> None:
    with threads(1):
        assert_no_changes(before, report())


def assert_no_changes(before: dict[str, Any], after: dict[str, Any]) -> None:
    found = compare_reports(before, after)
    assert not found.those("worse")
    assert not found.those("better")
    assert not found.not_compared
    assert len(found.changes) > 200
    assert found.build == [("threads", "2", "1")]


def test_a_planted_change_is_named(before: dict[str, Any], faulty: dict[str, Any]) -> None:
    found = compare_reports(before, faulty)
    assert not found.those("better")
    worse = places(found, "worse")
    assert ("run", "") in worse
    in_mlp = {where.split(",")[0] for what, where in worse if what == "activation"}
    assert in_mlp == {"blocks.0.mlp.hook_post"}
    assert "gelu_new" in {one.place.operation for one in found.those("worse")}
    assert found.those("worse")[0].place.what in ("run", "use")
    back = compare_reports(faulty, before)
    assert places(back, "better") == worse
    assert not back.those("worse")


def change(before: Measured, after: Measured) -> str:
    return Change(Place("cpu float32", "activation"), before, after).verdict


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (Measured(PASS, 2.0, 24.0), Measured(PASS, 2.0 * 2**BITS, 24.0), "the same"),
        (Measured(PASS, 2.0, 24.0), Measured(PASS, 2.1 * 2**BITS, 24.0), "worse"),
        (Measured(PASS, 0.0, float("inf")), Measured(PASS, 2**BITS, 25.0), "the same"),
        (Measured(PASS, 2.0, 24.0), Measured(PASS, 2.0, 24.0 - BITS), "the same"),
        (Measured(PASS, 2.0, 24.0), Measured(PASS, 2.0, 23.9 - BITS), "worse"),
        (Measured(PASS, 0.1, 28.0), Measured(PASS, 0.9, 24.0), "the same"),
        (Measured(WRONG, float("inf"), 1.0), Measured(WRONG, 99.0, 1.0), "better"),
        (Measured(WRONG, 99.0, 1.0), Measured(WRONG, float("inf"), 1.0), "worse"),
        (Measured(WRONG, float("inf")), Measured(WRONG, float("inf")), "the same"),
        (Measured(WRONG, float("inf"), 1.0), Measured(PASS, 1.0, 24.0), "better"),
        (Measured(PASS), Measured(WRONG), "worse"),
        (Measured(PASS), Measured(UNCHECKED), "worse"),
        (Measured(WRONG), Measured(UNCHECKED), "worse"),
        (Measured(UNCHECKED), Measured(PASS), "better"),
        (Measured(UNCHECKED), Measured(WRONG), "worse"),
    ],
)
def test_the_verdict_of_a_change(before: Measured, after: Measured, verdict: str) -> None:
    assert change(before, after) == verdict
    if UNCHECKED not in (before.verdict, after.verdict):
        opposite = {"worse": "better", "better": "worse"}.get(verdict, verdict)
        assert change(after, before) == opposite


def test_other_weights_leave_only_the_verdicts(before: dict[str, Any], faulty) -> None:
    found = compare_reports(before, faulty | {"weights": "other weights"})
    assert "models differ (small stress weights; other weights)" in found.not_compared[0]
    assert {one.place.what for one in found.changes} == {"run", "use", "invariant"}
    assert ("use", "forward") in places(found, "worse")


def test_runs_of_one_report_alone_are_named(before: dict[str, Any]) -> None:
    after = deepcopy(before)
    after["runs"].append(after["runs"][0] | {"dtype": "bfloat16", "mode": "compiled"})
    after["runs"][0]["probes"].append(after["runs"][0]["probes"][0] | {"name": "new"})
    found = compare_reports(before, after)
    assert found.not_compared == [
        "cpu bfloat16, compiled: only the second report has it",
        "cpu float32: 1 result that only the second report has",
    ]
    assert not found.those("worse")
    after["runs"] = after["runs"][1:]
    with pytest.raises(ValueError, match=r"no result in common; cpu float32: only the first"):
        compare_reports(before, after)


def test_a_device_that_is_no_longer_checked(before: dict[str, Any]) -> None:
    after = deepcopy(before)
    after["runs"] = [
        before["runs"][0]
        | {"uses": [], "by_use": [], "isolated": [], "end_to_end": [], "invariants": []}
        | {"probes": [], "verdict": "NOT CHECKED"}
    ]
    assert places(compare_reports(before, after), "worse") == {("run", "")}


def test_settings_and_versions_are_named(before: dict[str, Any]) -> None:
    after = deepcopy(before)
    after["environment"] |= {"torch": "9.9", "MKL_CBWR": "AVX2"}
    after["environment"]["build"] += " USE_NEW=ON"
    after["runs"][0]["settings"] = dict.fromkeys(before["runs"][0]["settings"], "bf16")
    del after["environment"]["isa"]
    build = {key: (old, new) for key, old, new in compare_reports(before, after).build}
    assert build.keys() == {"torch", "MKL_CBWR", "build", "isa", *after["runs"][0]["settings"]}
    assert build["MKL_CBWR"] == ("not set", "AVX2")
    assert build["build"] == ("", "USE_NEW=ON")
    assert build["isa"][1] == "not recorded"


@pytest.fixture
def written(
    tmp_path: Path, before: dict[str, Any], faulty: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Any], str]:
    monkeypatch.setenv("COLUMNS", "80")

    def write(name: str, values: Any) -> str:
        path = tmp_path / name
        path.write_text(json.dumps(values))
        return str(path)

    return write


def test_the_command(
    written: Callable[[str, Any], str], before, faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty["environment"]["torch"] = "9.9"
    one, other = written("before.json", before), written("after.json", faulty)
    done = call("compare", one, other)
    assert done.exit_code == 1
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "9.9" in done.stdout
    assert "PASS → WRONG" in done.stdout
    assert "more; --rows prints all" in done.stdout
    assert "got worse, 0 got better." in done.stdout.splitlines()[-1]
    monkeypatch.setenv("COLUMNS", "200")
    everything = call("compare", one, other, "--rows").stdout
    assert "blocks.0.mlp.hook_post" in everything
    assert "--rows" not in everything
    assert call("compare", other, one).exit_code == 0
    done = call("compare", one, one)
    assert (done.exit_code, done.stdout.splitlines()[0]) == (
        0,
        "Versions, processor and settings are the same.",
    )
    assert done.stdout.splitlines()[-1].endswith("results compared: nothing changed.")


def test_what_cannot_be_compared(
    written: Callable[[str, Any], str], before: dict[str, Any], tmp_path: Path
) -> None:
    good = written("good.json", before)
    for version, age in ((1, "an older"), (99, "a newer")):
        other = written("other.json", before | {"version": version})
        assert_one_line(call("compare", good, other), f"was written by {age} clean_transformer")
        assert_one_line(call("compare", other, good), f"was written by {age} clean_transformer")
    damaged = written("damaged.json", {key: before[key] for key in ("schema", "version")})
    assert_one_line(call("compare", good, damaged), "is damaged")
    no_verdict = deepcopy(before)
    no_verdict["runs"][0]["verdict"] = "FINE"
    assert_one_line(call("compare", good, written("fine.json", no_verdict)), "FINE")
    for text in ("{", "[]", '"x"', "{}", '{"schema": 3, "version": 2}'):
        (tmp_path / "none.json").write_text(text)
        assert_one_line(call("compare", good, tmp_path / "none.json"), "is no report")
    assert_one_line(call("compare", good, tmp_path / "missing.json"), "missing.json")
    write_results(results(result(part("ours"), 1.0)), [], tmp_path / "bench.json")
    assert_one_line(call("compare", good, tmp_path / "bench.json"), "two reports of one of these")
    foreign = written("foreign.json", {"schema": "a", "version": 1})
    assert_one_line(call("compare", foreign, foreign), "has the format a")
