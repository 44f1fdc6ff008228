"""`bench`: what it prints, writes and refuses. Made-up times stand in for measuring."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clean_transformer.benchmark.results.data import Result
from clean_transformer.benchmark.results.file import read_results
from clean_transformer.benchmark.running.models import TINY, write_models
from clean_transformer.benchmark.running.race import Race
from clean_transformer.benchmark.suite import Benchmark
from clean_transformer.benchmark.work import BYTES, Measurement
from clean_transformer.cli import app

FOUND = {"limit": 1.0, "optimized": 1.05, "optimized compiled": 1.05, "ours": 1.3}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs the command. `seconds` gives made-up times by contestant; None: it failed."""

    def call(*arguments: str, **seconds: float | None) -> tuple[int, str]:
        def run(race: Race, planned: list[Measurement], on_turn: Any) -> list[Result]:
            assert {"tiny", "small"} <= {*race.folders}
            rows = []
            for measurement in planned:
                for part in measurement.parts:
                    on_turn(part)
                    name, dtype = part.setup.contestant, part.setup.dtype
                    value = seconds.get(name.split()[0], FOUND.get(name, 20.0))
                    if part.work.kind in BYTES or part.work.kind in ("import", "load"):
                        value = 100.0 if name == "transformers sdpa" else 1.0
                    if name == "watched":
                        value = 1.3
                    why = "" if value else "it broke"
                    values = [value / (6 if dtype == "int8" else 1)] * 3 if value else []
                    rows.append(Result(measurement.title, part, name, values, why))
            return rows

        monkeypatch.setattr(Race, "run", run)
        monkeypatch.setattr("clean_transformer.benchmark.running.models.config", lambda name: TINY)
        monkeypatch.setattr("clean_transformer.benchmark.results.figures.config", lambda name: TINY)
        monkeypatch.setattr(
            "clean_transformer.benchmark.suite.is_available", lambda name: name == "cpu"
        )
        done = CliRunner().invoke(app, ["bench", *arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.output
        return done.exit_code, done.output

    return call


def test_all_goals_hold(call: Callable[..., tuple[int, str]]):
    status, output = call("--quick")
    assert status == 0
    assert "16 HELD" in output
    assert "MISSED" not in output


def test_a_goal_is_missed(call: Callable[..., tuple[int, str]]):
    status, output = call("--quick", optimized=15.0)
    assert status == 1
    assert "MISSED" in output
    assert "the limit allows" in output


def test_a_peer_is_missing(call: Callable[..., tuple[int, str]]):
    status, output = call("--quick", HookedTransformer=None)
    assert status == 3
    assert "it broke" in output
    assert "4 NOT MEASURED" in output


def test_an_absent_device_is_not_measured_and_no_failure(call: Callable[..., tuple[int, str]]):
    status, output = call("--quick", "--device", "cpu,cuda")
    assert status == 0
    assert "this machine has no cuda" in output
    assert "2 NOT MEASURED" in output


def test_engines_may_be_missing(call: Callable[..., tuple[int, str]]):
    engines: dict[str, Any] = {"CTranslate2": None, "onnxruntime": None, "llama.cpp": None}
    status, output = call(**engines)
    assert status == 0
    assert "6 NOT MEASURED" in output


def test_only_some_contestants(call: Callable[..., tuple[int, str]], tmp_path: Path):
    file = tmp_path / "results.json"
    status, output = call("--quick", "--only", "ours, limit", "--json", str(file), ours=999.0)
    assert status == 0
    assert "goals" not in output
    contestants = {result.part.setup.contestant for result in read_results(file).results}
    assert contestants == {"ours", "limit"}
    assert json.loads(file.read_text())["goals"] == []


def test_the_chosen_contestant_fails(call: Callable[..., tuple[int, str]]):
    status, output = call("--quick", "--only", "ours", ours=None)
    assert status == 3
    assert "it broke" in output


def test_no_device_for_the_chosen_contestant(call: Callable[..., tuple[int, str]]):
    assert call("--quick", "--only", "ours", "--device", "cuda")[0] == 3


def test_an_unknown_contestant_is_refused(call: Callable[..., tuple[int, str]]):
    status, output = call("--quick", "--only", "ours,theirs")
    assert status == 2
    assert "there is no contestant 'theirs'; there are: limit, ours, optimized" in output


def test_what_is_written(call: Callable[..., tuple[int, str]], tmp_path: Path):
    pytest.importorskip("plotly")
    file, folder = tmp_path / "results.json", tmp_path / "figures"
    call("--json", str(file), "--figures", str(folder), "--threads", "1")
    assert read_results(file).environment["threads"] == "1"
    goals = json.loads(file.read_text())["goals"]
    assert {goal["verdict"] for goal in goals} == {"HELD"}
    assert {figure.name for figure in folder.iterdir()} == {
        *("throughput-forward.html", "throughput-generate.html", "throughput-capture.html"),
        *("throughput-generate-a-batch.html", "throughput-training.html", "roofline.html"),
        *(f"growth-{axis}.html" for axis in ("batch", "length", "context", "parameters")),
    }


@pytest.mark.parametrize("option", ["--json", "--figures"])
def test_a_missing_folder_is_refused_before_any_work(
    option: str, call: Callable[..., tuple[int, str]], tmp_path: Path
):
    assert call("--quick", option, str(tmp_path / "none" / "file"))[0] == 2


def test_figures_without_plotly_are_refused_before_any_work(
    call: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Benchmark, "run", lambda *_: pytest.fail("too late"))
    for module in [*sys.modules]:
        if module.startswith(("clean_transformer.analysis.plots", "plotly")) or module.endswith(
            "results.figures"
        ):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "plotly", None)
    status, output = call("--quick", "--figures", str(tmp_path / "figures"))
    assert status == 2
    assert "pip install 'clean-transformer[plots]'" in output


def test_a_model_that_does_not_fit_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clean_transformer.benchmark.running.models.memory", lambda: 10**8)
    folders, missing = write_models(["tiny", "xl"], tmp_path)
    assert {*folders} == {"tiny"}
    assert missing == {"xl": "xl needs 19 GB of memory, and this machine has 0 GB"}
