"""No command fails or loses anything because of an encoding or of a narrow terminal."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from clean_transformer.cli import COMMANDS, main
from clean_transformer.cli.terminal import read_text
from clean_transformer.parity import inputs
from clean_transformer.parity.same_function import Comparison
from clean_transformer.support.printable import ASCII

from ..helpers import reading_model, trained
from ..parity.report.test_terminal import REPORT as FOUND
from ..parity.report.test_terminal import SAME, WRONG_RUN, row
from ..parity.small import small_weights
from .running import call

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = Comparison(
    "blocks.11.attn.q.hook_in_of_a_head", "blocks.11.attn.hook_attn_scores", 1e-16, 1.0, 1e-12
)
REPORT = replace(
    FOUND,
    same_function=replace(SAME, rows=[LONG]),
    runs=[replace(WRONG_RUN, isolated=[row(LONG.name)])],
)


def run(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: object) -> tuple[int, str, str]:
    """The status of a command, and what it prints on streams of that encoding."""
    streams = [io.BytesIO(), io.BytesIO()]
    for name, stream in zip(("stdout", "stderr"), streams, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["clean-transformer", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = (stream.getvalue().decode(encoding) for stream in streams)
    return int(ended.value.code or 0), out, err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with its tokenizer, small weights for the parity suite, and a folder to run in."""
    reading_model(b_U=False).save_pretrained(tmp_path / "model")
    trained().save(str(tmp_path / "model/tokenizer.json"))
    weights = small_weights(n_layers=1, d_vocab=100, n_ctx=16)
    monkeypatch.setattr(inputs, "choose_weights", lambda source: weights)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_the_help_of_every_command(encoding: str, monkeypatch: pytest.MonkeyPatch):
    for command in COMMANDS:
        status, out, err = run(monkeypatch, encoding, command.__name__, "--help")
        assert (status, err) == (0, "")
        assert "Usage: " in out
        assert r"\u" not in out
        assert not re.search(r"<(bool|str|int|float|path|list)", out)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("tokens", "a 日b"),
        ("predict", "a 日b"),
        ("generate", "a 日b", "-n", 3),
        ("generate", "a 日b", "-n", 3, "--stream"),
        ("generate", "a 日b", "-n", 3, "--json", "-"),
        ("explain", "a 日b", "--html", "日.html"),
        ("info",),
    ],
)
def test_commands_that_read_a_model(arguments, encoding: str, folder: Path, monkeypatch):
    status, out, err = run(monkeypatch, encoding, *arguments, "--weights", "model")
    assert status == 0, err
    assert out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_swap_and_its_report(encoding: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    arguments = ("--module", "blocks.0.mlp", "--with", "variants.ReluMLP", "--device", "cpu")
    status, out, err = run(monkeypatch, encoding, "swap", *arguments, "--html", "report.html")
    assert (status, err) == (0, "")
    assert "-> " in out
    assert "wrote report.html" in out
    assert "→" in (folder / "report.html").read_text(encoding="utf-8")


def test_what_has_no_name_in_ascii_is_escaped(folder: Path, monkeypatch: pytest.MonkeyPatch):
    status, out, err = run(monkeypatch, "ascii", "tokens", "日", "--weights", "no/é\udcff")
    assert (status, out) == (2, "")
    assert r"no/\xe9\udcff" in err


def test_bytes_that_python_read_as_ascii_are_the_text():
    broken = "né".encode().decode("ascii", "surrogateescape")
    assert read_text(broken, None) == "né"
    with pytest.raises(ValueError, match="the text is not UTF-8"):
        read_text("\udce9", None)


def test_each_replacement_is_ascii_and_each_bar_one_character():
    assert all(text.isascii() for text in ASCII.values())
    assert all(len(ASCII[bar]) == 1 for bar in "·▁▂▃▄▅▆▇█")


@pytest.fixture
def finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `parity` and `doctor` report what another run found, at once."""
    monkeypatch.setattr("clean_transformer.parity.suite.run_suite", lambda *_, **__: REPORT)
    monkeypatch.setattr("clean_transformer.parity.suite.check_device", lambda *_, **__: WRONG_RUN)


@pytest.mark.parametrize("command", ["parity", "doctor"])
def test_reports_are_written_before_anything_is_printed(
    command: str, finished: None, monkeypatch: pytest.MonkeyPatch
):
    class Gone(Console):
        def print(self, *objects: object, **options: object) -> None:
            raise OSError("the terminal is gone")

    monkeypatch.setattr("clean_transformer.cli.parity.open_console", Gone)
    options = ["--reference", "none", "--html", "report.html"] if command == "parity" else []
    result = call(command, "--device", "cpu", *options, "--json", "report.json")
    assert (result.exit_code, result.stderr) == (2, "error: the terminal is gone\n")
    assert json.loads(Path("report.json").read_text())["verdict"] == "WRONG"
    assert Path("report.html").exists() == (command == "parity")


@pytest.mark.parametrize("command", ["parity", "doctor"])
def test_a_full_disk_does_not_hide_the_verdict(
    command: str, finished: None, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clean_transformer.parity.report.json.write_json", fail)
    result = call(command, "--device", "cpu", "--json", "report.json")
    assert result.exit_code == 2
    assert "No space left" in result.stderr
    assert "WRONG" in result.stdout


@pytest.mark.parametrize("width", [80, 120, None])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_names_are_whole(width: int | None, encoding: str, finished: None, monkeypatch):
    if width is not None:
        console = Console(width=width, force_terminal=True, no_color=True)
        monkeypatch.setattr("clean_transformer.cli.parity.open_console", lambda **_: console)
    monkeypatch.setenv("COLUMNS", "80")  # which a log file does not have
    status, out, _ = run(monkeypatch, encoding, "parity", "--device", "cpu", "--rows")
    assert status == 1
    assert "…" not in out
    assert "..." not in out
    lines = out.splitlines()
    [compared] = [line for line in lines if line.lstrip().startswith(LONG.key)]
    assert any(line.startswith(f"{LONG.name} ") for line in lines)
    if width != 80:
        assert LONG.name in compared
    if width is None:
        assert max(map(len, lines)) > 120


@pytest.mark.parametrize("command", ["parity", "doctor"])
def test_a_folder_that_nobody_may_write_in_does_not_hide_the_verdict(
    command: str, finished: None, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("clean_transformer.cli.terminal.write_atomically", fail)
    result = call(command, "--device", "cpu")
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert result.stderr.startswith("note: reproduce-mm-cuda1-float32.py was not written: [Errno")
