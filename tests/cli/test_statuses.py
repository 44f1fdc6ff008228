"""No command ends in a traceback, or with status 1, which means WRONG, when it could not run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clean_transformer.cli import COMMANDS
from clean_transformer.weights.hub import DEMO

from ..conftest import ROOT
from .running import assert_one_line, call

RESULTS = ROOT / "benchmarks" / "results"


def config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def content(name: str, text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text) and None


def tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[WTE] = change(tensors[WTE])
        save_file(tensors, folder / "model.safetensors")

    return put


WTE = "transformer.wte.weight"
BAD_MODELS: dict[str, Callable[[Path], object]] = {
    "n_head is text": config(n_head="four"),
    "n_head is a list": config(n_head=[1]),
    "n_embd is None": config(n_embd=None),
    "n_layer is negative": config(n_layer=-1),
    "the config is a list": content("config.json", b"[]"),
    "the config is deep": content("config.json", b"[" * 100_000),
    "the config is not UTF-8": content("config.json", b"\xff"),
    "the weights are empty": content("model.safetensors", b""),
    "the weights are text": content("model.safetensors", b"hello" * 100),
    "the header is a list": content("model.safetensors", b"\x02" + bytes(7) + b"[]"),
    "the layers are too many": config(n_layer=10**9),
    "a weight is NaN": tensor(lambda weight: weight * float("nan")),
    "a weight is an integer": tensor(lambda weight: weight.int()),
    "a weight has another shape": tensor(lambda weight: weight[:-1].contiguous()),
    "there is no config": lambda folder: (folder / "config.json").unlink(),
    "the weights are a folder": lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "model.safetensors").mkdir(),
    ),
}
WITH_WEIGHTS = {
    "generate": ("generate", "a"),
    "predict": ("predict", "a"),
    "explain": ("explain", "a", "--html", "page.html"),
    "info": ("info",),
    "swap": ("swap", "--module", "blocks.0.mlp", "--with", "variants.ReluMLP"),
    "parity": ("parity", "--reference", "none"),
    "doctor": ("doctor",),
    "check": ("check", "model", "--as", "ours"),
    "train": (
        "train",
        "tokens.txt",
        "--tokenizer",
        "demo",
        "--out",
        "run",
        "--steps",
        "1",
        "--batch",
        "1",
    ),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO, tmp_path / "model")
    (tmp_path / "tokens.txt").write_text("a story")
    return tmp_path


@pytest.mark.parametrize("command", WITH_WEIGHTS)
@pytest.mark.parametrize("bad", BAD_MODELS)
def test_a_bad_model_is_one_line_and_status_2(command: str, bad: str, folder: Path):
    BAD_MODELS[bad](folder / "model")
    weights = () if command == "check" else ("--weights", "model")
    assert_one_line(call(*WITH_WEIGHTS[command], *weights), "")


DEEP = "[" * 100_000
WITH_FILES = (
    ("compare", "FILE", "FILE"),
    ("generate", "--file", "FILE", "--weights", "FILE"),
    ("predict", "--file", "FILE", "--weights", "FILE"),
    ("tokens", "a", "--weights", "FILE"),
    ("info", "--weights", "FILE"),
    ("swap", "--module", "embed", "--with", "FILE:Name", "--weights", "demo"),
    ("train", "FILE", "--out", "run", "--steps", "1", "--batch", "1", "--tokenizer", "FILE"),
    ("notebook", "FILE"),
    ("check", "FILE"),
    ("check", "FILE:function"),
    ("bench", "--only", "FILE"),
    ("bench", "--quick", "--json", "no/FILE/report"),
)


def test_every_command_gets_bad_inputs():
    commands = {command.__name__ for command in COMMANDS}
    assert commands == {*WITH_WEIGHTS} | {command for command, *_ in WITH_FILES}


@pytest.mark.parametrize("file", ["missing", ".", "empty", "deep", "list", "wrong"])
@pytest.mark.parametrize("command", WITH_FILES, ids=lambda command: command[0])
def test_a_bad_file_is_one_line_and_status_2(command, file: str, folder: Path):
    (folder / "empty").touch()
    (folder / "deep").write_text(DEEP)
    (folder / "list").write_text("[1, 2]")
    (folder / "wrong").write_text('{"schema": 5, "version": "x"}')
    assert_one_line(call(*(part.replace("FILE", f"./{file}") for part in command)), "")


@pytest.mark.parametrize("option", ["--json", "--html"])
@pytest.mark.parametrize("place", ["nowhere/report", "model"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(option: str, place: str):
    result = call(*WITH_WEIGHTS["swap"], "--weights", "missing", option, place)
    assert_one_line(result, "make it first" if "/" in place else "is a folder")


STRANGE = "\x1b[2J[/red]\u202e"


def test_a_report_cannot_control_the_terminal(folder: Path):
    report = json.loads((RESULTS / "two_core_amd_avx512.json").read_text())
    for row in report["results"]:
        row["measurement"] += STRANGE
    for name, version in (("before", "1\x1b[2J"), ("after", "[/bold]2")):
        report["environment"]["torch"] = version
        (folder / name).write_text(json.dumps(report))
    result = call("compare", "before", "after")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    assert "\u202e" not in result.stdout
    assert r"1\x1b[2J" in result.stdout
    assert "[/red]" in result.stdout
