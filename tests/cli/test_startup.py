"""The command line starts at once: PyTorch is imported only when a command does its work."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from clean_transformer.cli import COMMANDS, app

# Calls the command line with each list of arguments, and stops at the first that imports too much.
# One process for all, because a process takes a third of a second to start.
RUN = """
import json, sys
from clean_transformer.cli import main
for given in json.loads(sys.argv[1]):
    sys.argv = ["clean-transformer", *given]
    try:
        main()
        status = 0
    except SystemExit as exit:
        status = exit.code or 0
    slow = {"torch", "jaxtyping", "numpy", "tokenizers", "huggingface_hub"} & {*sys.modules}
    print("ran:", json.dumps([given, status, sorted(slow)]))
    if slow:
        break
"""
NAMES = [command.__name__ for command in COMMANDS]
# Arguments, and the exit status that they give.
CALLS = [
    *(([name, "--help"], 0) for name in NAMES),
    (["--help"], 0),
    (["--version"], 0),
    ([], 2),
    (["genrate"], 2),
    (["train", "--step", "3"], 2),
    (["generate", "text", "--temperature", "-1"], 2),
]


def test_pytorch_is_not_imported():
    calls = json.dumps([arguments for arguments, _ in CALLS])
    run = subprocess.run(
        [sys.executable, "-c", RUN, calls], capture_output=True, encoding="utf-8", check=True
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("ran: ")]
    ran = [json.loads(line.removeprefix("ran: ")) for line in lines]
    assert ran == [[arguments, status, []] for arguments, status in CALLS], run.stderr


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_says_what_its_exit_statuses_mean(name: str):
    assert "Exit status: 0 " in CliRunner().invoke(app, [name, "--help"]).output


def test_python_m_clean_transformer():
    command = [sys.executable, "-m", "clean_transformer", "--version"]
    run = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert run.stdout == CliRunner().invoke(app, ["--version"]).output
    name, version = run.stdout.split()
    assert name == "clean-transformer"
    assert version[0].isdigit()
