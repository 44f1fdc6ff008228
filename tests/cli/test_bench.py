"""`bench`: what it prints, writes and refuses. Made-up times stand in for measuring."""

import json
import re
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

FOUND = {"limit": 1.0, "optimized": 1.05, "optimized compiled": 1.05, "ours": 1.2}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs the command. `seconds` gives made-up times by contestant; None: it failed."""

    def call(*arguments: str, **seconds: float | None) -> tuple[int, str]:
        def run(
            race: Race, planned: list[Measurement], on_turn: Any, on_results: Any
        ) -> list[Result]:
            assert "tiny" in race.folders
            rows = []
            for measurement in planned:
                for part in measurement.parts:
                    on_turn(part)
                    name, dtype = part.setup.contestant, part.setup.dtype
                    value = seconds.get(name.split()[0], FOUND.get(name, 20.0))
                    if part.work.kind in BYTES or part.work.kind in ("import", "load"):
                        value = 100.0 if name == "transformers sdpa" else 1.0
                    if part.work.kind in ("help", "doctor", "divergence"):
                        value = 0.01
                    if name == "watched":
                        value = 1.3
                    why = "" if value else "it broke"
                    values = [value / (6 if dtype == "int8" else 1)] * 3 if value else []
                    rows.append(Result(measurement.title, part, name, values, why))
                on_results(rows)
            return rows

        monkeypatch.setattr(Race, "run", run)
        monkeypatch.setattr("clean_transformer.benchmark.results.figures.config", lambda name: TINY)
        monkeypatch.setattr("clean_transformer.benchmark.running.models.config", lambda name: TINY)
        monkeypatch.setattr(
            "clean_transformer.benchmark.suite.is_available", lambda name: name == "cpu"
        )
        done = CliRunner().invoke(app, ["bench", *arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.output
        return done.exit_code, done.output

    return call


def test_all_goals_hold(call: Callable[..., tuple[int, str]]):
    status, output = call("--goals", "--quick")
    assert status == 0
    assert "16 HELD" in output
    assert "MISSED" not in output


def test_a_goal_is_missed(call: Callable[..., tuple[int, str]]):
    status, output = call("--goals", "--quick", ours=15.0)
    assert status == 1
    assert "MISSED" in output
    assert "the limit allows" in output


def test_a_peer_is_missing(call: Callable[..., tuple[int, str]]):
    status, output = call("--goals", "--quick", HookedTransformer=None)
    assert status == 3
    assert "it broke" in output
    assert "2 NOT MEASURED" in output


@pytest.mark.parametrize("devices", ["cuda", "cpu,cuda"])
@pytest.mark.parametrize("goals", [(), ("--goals", "--quick")])
def test_an_absent_device_is_not_measured_and_no_success(
    devices: str, goals: tuple[str, ...], call: Callable[..., tuple[int, str]]
):
    status, output = call(*goals, "--device", devices)
    assert status == 3
    assert "NOT MEASURED: cuda: this machine has no cuda" in output
    if "cpu" not in devices:
        assert "tokens/s" not in output
    assert ("2 NOT MEASURED" in output) == bool(goals)
    assert ("HELD" in output) == bool(goals and "cpu" in devices)


def test_engines_may_be_missing(call: Callable[..., tuple[int, str]]):
    engines: dict[str, Any] = {"CTranslate2": None, "onnxruntime": None, "llama.cpp": None}
    status, output = call("--goals", **engines)
    assert status == 0
    assert "7 NOT MEASURED" in output


def test_only_some_contestants(call: Callable[..., tuple[int, str]], tmp_path: Path):
    file = tmp_path / "results.json"
    status, output = call(
        "--goals", "--quick", "--only", "ours, limit", "--json", str(file), ours=999.0
    )
    assert status == 0
    assert "goals" not in output
    contestants = {result.part.setup.contestant for result in read_results(file).results}
    assert contestants == {"ours", "limit"}
    assert json.loads(file.read_text())["goals"] == []


def test_the_chosen_contestant_fails(call: Callable[..., tuple[int, str]]):
    status, output = call("--goals", "--quick", "--only", "ours", ours=None)
    assert status == 3
    assert "it broke" in output


def test_no_device_for_the_chosen_contestant(call: Callable[..., tuple[int, str]]):
    assert call("--goals", "--quick", "--only", "ours", "--device", "cuda")[0] == 3


def test_an_unknown_contestant_is_refused(call: Callable[..., tuple[int, str]]):
    status, output = call("--goals", "--quick", "--only", "ours,theirs")
    assert status == 2
    assert "there is no contestant 'theirs'; there are: limit, ours, optimized" in output


def test_what_is_written(call: Callable[..., tuple[int, str]], tmp_path: Path):
    pytest.importorskip("plotly")
    file, folder = tmp_path / "results.json", tmp_path / "figures"
    call("--goals", "--json", str(file), "--figures", str(folder), "--threads", "1")
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
    (tmp_path / "none").touch()
    assert call("--goals", "--quick", option, str(tmp_path / "none" / "file"))[0] == 2


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
    status, output = call("--goals", "--quick", "--figures", str(tmp_path / "figures"))
    assert status == 2
    assert "pip install 'clean-transformer[plots]'" in output


def test_a_model_that_does_not_fit_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("clean_transformer.benchmark.running.models.memory", lambda: 10**8)
    folders, missing = write_models(["tiny", "xl"], tmp_path)
    assert {*folders} == {"tiny"}
    assert missing == {"xl": "xl needs 19 GB of memory, and this machine has 0 GB"}


# A question of one's own.


def test_the_answer_to_a_question(call: Callable[..., tuple[int, str]], tmp_path: Path):
    file = tmp_path / "results.json"
    sizes = ("--batch", "2", "--length", "100", "--new", "50", "--threads", "1")
    status, output = call(*sizes, "--json", str(file), ours=2.0, limit=1.0)
    assert status == 0
    assert "GPT-2 small in float32: 2 × 100 tokens read, then 50 written" in output
    [line] = [line for line in output.splitlines() if line.lstrip().startswith("ours, cpu")]
    assert line.split()[2:] == ["100", "50%", "2.00", "s", "50", "50%", "0", "MB"]
    assert f"wrote {file}" in output
    works = {str(result.part.work) for result in read_results(file).results}
    assert works == {
        *("forward 2 × 100, all logits", "first token after 2 × 100"),
        *("generate 2 × 100 + 50", "memory"),
    }
    assert json.loads(file.read_text())["goals"] == []


def test_json_alone_goes_to_standard_output(call: Callable[..., tuple[int, str]]):
    call()  # makes up the times of the next run, too
    result = CliRunner().invoke(app, ["bench", "--json", "-"])
    assert json.loads(result.stdout)["goals"] == []
    assert "1 × 128 tokens read" in result.stderr


def test_dtype_size_and_contestants_of_a_question(call: Callable[..., tuple[int, str]]):
    status, output = call("--dtype", "int8", "--size", "medium", ours=None)
    assert status == 0
    assert "GPT-2 medium in int8" in output
    assert "ours" not in output
    status, output = call("--only", "ours", ours=None)
    assert status == 3
    assert "NOT MEASURED: forward 1 × 128, all logits: ours, float32: it broke" in output
    assert "limit, cpu" not in output


def test_what_it_does_is_said_at_once_and_with_an_estimate(call: Callable[..., tuple[int, str]]):
    first = call()[1].splitlines()[0]
    assert re.fullmatch(r"0/52 writing the weights; all takes about \d+ min", first)


# Patterns of what typer says. Its versions word it in two ways.
RANGE = r"for '{0}': (Input should be greater than or equal to {2}|{1} is not in the range x>={2})"
NUMBER = r"for '--length': (Input should be a valid integer|'many' is not a valid int)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", "-1"), RANGE.format("--threads", -1, 0)),
        (("--batch", "0"), RANGE.format("--batch", 0, 1)),
        (("--length", "many"), NUMBER),
        (
            ("--length", "1000", "--new", "25"),
            "1000 tokens and 25 new ones are more than the n_ctx",
        ),
        (("--dtype", "fp8"), "no dtype 'fp8'; choose from float32, bfloat16, float16, int8"),
        (("--size", "huge"), "no size 'huge'; choose from small"),
        (("--dtype", "int8", "--only", "ours,limit"), "no int8 for ours; only optimized has it"),
        (("--goals", "--batch", "2"), "--goals measures work of its own; leave out --batch"),
        (("--quick", "--batch", "2"), "--goals measures work of its own; leave out --batch"),
        (("--hooked-python", "no/python"), "--hooked-python no/python is not a program"),
        (("--device", "gpu"), "unknown device 'gpu'"),
    ],
)
def test_refused_before_any_work(
    arguments: tuple[str, ...],
    message: str,
    call: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(Benchmark, "run", lambda *_: pytest.fail("too late"))
    status, output = call(*arguments)
    assert status == 2
    assert re.search(message, " ".join(output.replace("│", " ").split()))


def test_figures_that_cannot_be_written_leave_no_folder(
    call: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("plotly")

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("clean_transformer.benchmark.results.figures.save", fail)
    status, _ = call("--goals", "--figures", str(tmp_path / "figures"), "--threads", "1")
    assert status == 2
    assert not (tmp_path / "figures").exists()


def test_figures_of_a_question(call: Callable[..., tuple[int, str]], tmp_path: Path):
    pytest.importorskip("plotly")
    folder = tmp_path / "new/figures"
    assert call("--figures", str(folder))[0] == 0
    assert {figure.name for figure in folder.iterdir()} == {
        *("throughput-forward.html", "throughput-generate.html", "roofline.html"),
    }
    (tmp_path / "file").touch()
    assert call("--figures", str(tmp_path / "file"))[0] == 2


def test_a_figure_of_growth_joins_only_what_grows():
    pytest.importorskip("plotly")
    from clean_transformer.benchmark.results.figures import GROWTH, growth

    file = Path(__file__).parents[2] / "benchmarks/results/two_core_amd_avx512.json"
    found = read_results(file)
    for axis in GROWTH:
        for line in growth(found, axis).data:
            assert len({*line.x}) == len(line.x) > 1, (axis, line.name)


def test_ours_stands_out():
    pytest.importorskip("plotly")
    from clean_transformer.benchmark.results.figures import growth, throughput

    file = Path(__file__).parents[2] / "benchmarks/results/two_core_amd_avx512.json"
    found = read_results(file)
    lines = {line.name.partition(",")[0]: line.line for line in growth(found, "length").data}
    assert lines["optimized"].width > lines["transformers sdpa"].width
    [bars] = throughput(found, "generate").data
    colors = {
        name.partition("<")[0]: color for name, color in zip(bars.y, bars.marker.color, strict=True)
    }
    assert colors["ours"] == colors["optimized"] != colors["transformers sdpa"]
    assert colors["limit"] not in (colors["ours"], colors["transformers sdpa"])
