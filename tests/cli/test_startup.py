"""The command line starts at once: PyTorch is imported only when a command does its work."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from clean_transformer.cli import COMMANDS, app

RUN = """
import sys
from clean_transformer.cli import main
sys.argv = ["clean-transformer", *sys.argv[1:]]
try:
    main()
finally:
    slow = {"torch", "jaxtyping", "numpy", "tokenizers", "huggingface_hub"} & {*sys.modules}
    print("slow imports:", sorted(slow))
"""
NAMES = [command.__name__ for command in COMMANDS]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        *(((name, "--help"), 0) for name in NAMES),
        (("--help",), 0),
        (("--version",), 0),
        ((), 2),
        (("genrate",), 2),
        (("train", "--step", "3"), 2),
        (("generate", "text", "--temperature", "-1"), 2),
    ],
)
def test_pytorch_is_not_imported(arguments: tuple[str, ...], status: int):
    run = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, encoding="utf-8", check=False
    )
    assert run.returncode == status, run.stderr
    assert run.stdout.splitlines()[-1] == "slow imports: []"


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
