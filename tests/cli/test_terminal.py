import io
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import typer
from rich.console import Console

from clean_transformer.cli.terminal import one_line_errors, progress, read_text


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes, kind=io.TextIOWrapper) -> None:
    monkeypatch.setattr(sys, "stdin", kind(io.BytesIO(content), encoding="ascii"))


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("two\n lines"), 2, "error: two lines"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'"),
        (RuntimeError("[bold]out of memory"), 2, "error: [bold]out of memory"),
        (KeyboardInterrupt(), 130, "stopped"),
        (typer.Exit(3), 3, ""),
    ],
)
def test_errors_end_with_a_status_and_one_line(error, status: int, message: str, capsys):
    with pytest.raises(typer.Exit) as exit_, one_line_errors():
        raise error
    assert exit_.value.exit_code == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.strip() == message


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), TypeError("a bug")])
def test_what_is_not_for_us_goes_on(error, capsys):
    with pytest.raises(type(error)), one_line_errors():
        raise error
    assert capsys.readouterr().err == ""


def test_no_bar_where_nobody_looks(capsys):
    with progress() as on_step:
        on_step("reading")
    assert capsys.readouterr() == ("", "")


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal instead of standard error."""
    screen = io.StringIO()
    terminal = partial(Console, file=screen, force_terminal=True, width=100)
    monkeypatch.setattr("clean_transformer.cli.terminal.Console", lambda stderr: terminal())
    return screen


def test_a_bar_without_a_total_tells_the_time_and_disappears(monkeypatch):
    screen = on_a_terminal(monkeypatch)
    with progress() as on_step:
        on_step("reading the weights")
    assert "reading the weights" in screen.getvalue()
    assert "0:00:00" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")


def test_a_bar_with_a_total_counts_and_stays(monkeypatch):
    screen = on_a_terminal(monkeypatch)
    with progress(10) as on_step:
        on_step("loss 5", 7)
        on_step("loss 4", 8)
    *_, last, _ = screen.getvalue().splitlines()
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", last)
    assert " 8/10 loss 4 " in shown
    assert not screen.getvalue().endswith("\x1b[2K")


def test_a_bar_with_a_total_can_disappear(monkeypatch):
    screen = on_a_terminal(monkeypatch)
    with progress(10, stays=False) as on_step:
        on_step("invariants", 8)
    assert " 8/10 invariants " in re.sub(r"\x1b\[[\d;?]*\w", "", screen.getvalue())
    assert screen.getvalue().endswith("\x1b[2K")


TEXT = "naïve\n\ttext\r\n\n 🤗 "


def test_an_argument_is_the_text():
    assert read_text(TEXT, None) == TEXT
    assert read_text("", None) == ""


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_of_a_file_or_a_pipe_the_last_line_break_is_left_out(end: str, tmp_path: Path, monkeypatch):
    content = (TEXT + end).encode()
    (tmp_path / "text").write_bytes(content)
    assert read_text(None, tmp_path / "text") == TEXT
    for argument in (None, "-"):
        piped(monkeypatch, content)
        assert read_text(argument, None) == TEXT
    piped(monkeypatch, content, Terminal)  # typed
    assert read_text("-", None) == TEXT


def test_no_text(monkeypatch):
    piped(monkeypatch, b"", Terminal)
    with pytest.raises(ValueError, match="there is no text; give one as an argument, as --file"):
        read_text(None, None)


def test_two_texts(tmp_path: Path):
    with pytest.raises(ValueError, match="there are two texts"):
        read_text("a", tmp_path / "text")


def test_what_is_not_utf8(tmp_path: Path, monkeypatch):
    (tmp_path / "text").write_bytes(b"caf\xe9")
    message = re.escape(f"{tmp_path / 'text'} is not UTF-8 ('utf-8' codec can't decode byte 0xe9")
    with pytest.raises(ValueError, match=message):
        read_text(None, tmp_path / "text")
    piped(monkeypatch, b"caf\xe9")
    with pytest.raises(ValueError, match="standard input is not UTF-8"):
        read_text(None, None)
