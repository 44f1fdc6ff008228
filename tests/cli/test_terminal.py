import io
import os
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import typer
from rich.console import Console
from safetensors import SafetensorError

from clean_transformer.cli.terminal import (
    format_cell,
    one_line_errors,
    print_table,
    print_text,
    progress,
    read_text,
)


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes, kind=io.TextIOWrapper) -> None:
    monkeypatch.setattr(sys, "stdin", kind(io.BytesIO(content), encoding="ascii"))


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("two\n lines"), 2, "error: two lines"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: x: No such file"),
        (RuntimeError("[bold]out of memory"), 2, "error: [bold]out of memory"),
        (KeyboardInterrupt(), 130, "stopped"),
        (ValueError("a\x1b[2Jb\u202ec"), 2, r"error: a\x1b[2Jb\u202ec"),
        (MemoryError(), 2, "error: there is not enough memory"),
        (RecursionError("too deep"), 2, "error: too deep"),
        (BrokenPipeError(32, "Broken pipe"), 2, ""),
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


class NobodyReads(io.StringIO):
    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_table_that_nobody_reads_is_no_error(monkeypatch, capfd):
    """rich, which prints tables, raises `SystemExit` for a broken pipe."""
    monkeypatch.setattr(sys, "stdout", NobodyReads())
    monkeypatch.setattr(NobodyReads, "fileno", lambda _: os.open(os.devnull, os.O_WRONLY))
    with pytest.raises(typer.Exit) as exit_, one_line_errors():
        print_table("title", ["token"], [("the",)])
    assert exit_.value.exit_code == 2
    assert capfd.readouterr().err == ""


class PanicException(BaseException):
    """As Rust code raises it."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TypeError("a bug"), "TypeError: a bug"),
        (KeyError("n_head"), "KeyError: 'n_head'"),
        (AttributeError("no shape"), "AttributeError: no shape"),
        (ZeroDivisionError("division"), "ZeroDivisionError: division"),
        (AssertionError(), "AssertionError:"),
        (ValueError(), "ValueError:"),
        (PanicException("index out of bounds"), "PanicException: index out of bounds"),
        (SafetensorError("header too large"), "SafetensorError: header too large"),
        (SystemExit(1), "SystemExit: 1"),
    ],
)
def test_an_unexpected_error_says_its_kind_and_place(error, message: str, capsys):
    with pytest.raises(typer.Exit) as exit_, one_line_errors():
        raise error
    assert exit_.value.exit_code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"error: {re.escape(message)} \(test_terminal.py, line \d+\)", line)


class FullDisk(io.StringIO):
    def flush(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [None, typer.Exit(1)])
def test_a_full_disk_behind_standard_output_is_an_error(error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", FullDisk())

    @one_line_errors()
    def command() -> None:
        if error:
            raise error

    with pytest.raises(typer.Exit) as exit_:
        command()
    assert exit_.value.exit_code == 2
    assert "No space left on device" in capsys.readouterr().err


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


def test_a_message_is_broken_between_words(monkeypatch):
    screen, message = on_a_terminal(monkeypatch), "blocks.10.attn, " * 40
    with pytest.raises(typer.Exit), one_line_errors():
        raise ValueError(message)
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", screen.getvalue())
    assert shown.split() == ["error:", *message.split()]
    assert max(map(len, shown.splitlines())) <= 100


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


def test_an_empty_text(tmp_path: Path, monkeypatch):
    (tmp_path / "text").write_bytes(b"\r\n")
    piped(monkeypatch, b"\n")
    for text, file in (("", None), (None, tmp_path / "text"), ("-", None)):
        with pytest.raises(ValueError, match="the text is empty"):
            read_text(text, file)


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


@pytest.mark.parametrize("kind", [Terminal, io.TextIOWrapper])
def test_a_model_cannot_control_the_terminal(kind, monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", kind(output, encoding="utf-8"))
    print_text("a\tnaïve\n\x1b]0;title\x07\x9b2J\u202e")
    printed = output.getvalue().decode()
    if kind is Terminal:
        assert printed == "a\tnaïve\n\\x1b]0;title\\x07\\x9b2J\\u202e\n"
    else:
        assert printed == "a\tnaïve\n\x1b]0;title\x07\x9b2J\u202e\n"


def test_a_cell_cannot_control_the_terminal():
    assert format_cell("\x1b[2Jé\n") == r"\x1b[2Jé\n"


@pytest.mark.parametrize(("seconds", "logged"), [(0.0, [1, 2, 3]), (1000.0, [1, 3])])
def test_without_a_terminal_steps_are_logged_if_wanted(seconds, logged, capsys, monkeypatch):
    monkeypatch.setattr("clean_transformer.cli.terminal.SECONDS_PER_LINE", seconds)
    with progress(3, logged=True) as on_step:
        for step in (1, 2, 3):
            on_step(f"loss {step}", step)
    assert capsys.readouterr() == ("", "".join(f"{step}/3 loss {step}\n" for step in logged))
