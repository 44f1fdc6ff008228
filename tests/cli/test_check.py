"""`check`: exit statuses, one-line errors, models from files, and the files that it writes."""

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from clean_transformer.parity.any_model import target
from clean_transformer.parity.faults import inject
from clean_transformer.support.devices import is_available

from ..parity.any_model.models import SCRIPT
from ..parity.small import small_weights
from .running import assert_one_line, call

ABSENT = next((kind for kind in ("mps", "cuda") if not is_available(kind)), None)
LAYERS = """
import torch
from torch import nn

def make_model():
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 8))
"""
INPUTS = "def make_inputs(): return torch.ones(2, 8)\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # a file's folder is added to it
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def write(code: str, name: str = "mine.py") -> str:
    Path(name).write_text(code)
    return f"{name}:make_model"


def test_0_where_everything_passes(folder: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = "clean_transformer.cli.check.open_console"
    monkeypatch.setattr(terminal, lambda stderr: Console(width=80, stderr=stderr))
    result = call("check", write(LAYERS + INPUTS), "--device", "cpu", "--json", "r.json")
    assert result.exit_code == 0, result.output
    assert "PASS cpu computes Sequential correctly." in result.stdout
    assert "Sequential of mine.py:make_model; inputs: float32 [2, 8]" in result.stdout
    assert "no generate: the model has no method generate" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    read = json.loads((folder / "r.json").read_text())
    assert (read["schema"], read["version"]) == ("clean-transformer/check", 1)
    assert read["verdict"] == "PASS"
    assert {row["operation"] for row in read["uses"][0]["rows"]} == {"t", "addmm", "gelu"}


def test_1_and_a_script_where_something_is_wrong(folder: Path):
    with inject("linear-noncontiguous-weight"):
        result = call("check", write(LAYERS + INPUTS), "--device", "cpu")
    assert result.exit_code == 1, result.output
    assert "WRONG cpu computes Sequential wrongly." in result.stdout
    said = " ".join(result.stdout.split())
    assert "aten.addmm.default, in 0 (forward)" in said
    assert "stride [1, 8]" in said
    assert "matches the known issue linear-noncontiguous-weight" in said
    script = folder / "reproduce-addmm-cpu-float32.py"
    assert f"reproduction: {script.name}" in said
    exec(compile(script.read_text(), str(script), "exec"), {})
    with inject("linear-noncontiguous-weight"), pytest.raises(AssertionError, match="addmm"):
        exec(compile(script.read_text(), str(script), "exec"), {})


def test_2_where_the_model_raises():
    model = "def forward(x): raise KeyError('lost')\ndef make_model():\n"
    model += "    model = nn.Linear(8, 8); model.forward = forward; return model\n"
    result = call("check", write(LAYERS + INPUTS + model), "--device", "cpu")
    assert result.exit_code == 2
    assert "ERROR Linear raised an exception." in result.stdout
    assert "forward: running the model; KeyError: 'lost'" in result.stdout


def test_3_where_an_operation_cannot_be_checked():
    noise = LAYERS.replace("nn.Dropout(0.5)", "Noise()") + INPUTS
    noise += "class Noise(nn.Module):\n    def forward(self, x): return x + torch.rand_like(x)\n"
    result = call("check", write(noise), "--device", "cpu")
    assert result.exit_code == 3, result.output
    assert "NOT CHECKED no error was found, but not everything could be checked." in result.stdout
    assert "NOT CHECKED rand_like: 1 call" in result.stdout


@pytest.mark.skipif(ABSENT is None, reason="this machine has every device")
def test_3_where_the_machine_lacks_the_device():
    assert ABSENT is not None
    result = call("check", write(LAYERS + INPUTS), "--device", ABSENT)
    assert result.exit_code == 3
    assert f"NOT CHECKED {ABSENT}: this machine has no {ABSENT}" in result.stdout


def test_a_gpt2_of_this_package(monkeypatch: pytest.MonkeyPatch):
    weights = small_weights("plain", n_layers=1, d_vocab=100, n_ctx=16)
    monkeypatch.setattr(target, "choose_weights", lambda source: weights)
    result = call("check", "any", "--as", "ours", "--device", "cpu", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "DemoTransformer of small plain weights; inputs: int64 [2, 16]" in result.stdout
    assert "cpu in bfloat16" in result.stdout


def test_token_ids_for_a_model_from_a_file():
    result = call("check", write(SCRIPT), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "GPT of mine.py:make_model; inputs: int64 [2, 32]" in result.stdout
    assert "generate: generating text" in result.stdout


def test_a_file_imports_its_neighbor(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    write(LAYERS, "inner/neighbor.py")
    Path("inner/mine.py").write_text("from neighbor import *\n" + INPUTS)
    result = call("check", "inner/mine.py:make_model", "--device", "cpu", "--dtype", "float16")
    assert result.exit_code == 0, result.output
    assert "inputs: float16 [2, 8]" in result.stdout


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\n", "mine.py has no function 'make_model'"),
        ("def make_model(): return 1\n", "mine.py:make_model returns int, not an nn.Module"),
        ("def make_model(): return 1 / 0\n", "mine.py:make_model raised ZeroDivisionError"),
        ("import no_such_package\n", "mine.py raised ModuleNotFoundError"),
        ("import (\n", "mine.py raised SyntaxError"),
        (LAYERS, "the model has no config.vocab_size"),
        (LAYERS + "def make_inputs(): return {}['x']\n", "mine.py:make_inputs raised KeyError"),
    ],
)
def test_2_and_one_line_for_a_file_that_makes_no_model(code: str, message: str):
    assert_one_line(call("check", write(code), "--device", "cpu"), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no.py:make_model",), "there is no file no.py"),
        (("demo", "--as", "numpy"), "no --as 'numpy'; choose from auto, bridge, hooked"),
        (("mine.py:make_model", "--as", "ours"), "makes its own model; do not give --as ours"),
        (("no/such/folder/here",), "no/such/folder/here"),
        (("demo", "--device", "gpu"), "unknown device 'gpu'"),
        (("demo", "--device", "cpu,cuda"), "check runs on one device, not 'cpu,cuda'"),
        (("demo", "--dtype", "fp8"), "no dtype 'fp8'"),
        (("demo", "--json", "no/r.json"), "no folder 'no'"),
    ],
)
def test_2_and_one_line_for_what_cannot_be_done(arguments: tuple[str, ...], message: str):
    assert_one_line(call("check", *arguments), message)
