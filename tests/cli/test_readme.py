"""Every command is in the README of the command line, with an example that it can parse."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from clean_transformer import cli

README = Path(cli.__file__).with_name("README.md").read_text(encoding="utf-8")
TABLE = dict(re.findall(r"^\| `(\w+)` \| .* \| `clean-transformer (.*)` \|$", README, re.MULTILINE))
COMMANDS = typer.main.get_command(cli.app).commands


def test_the_table_has_every_command():
    assert {*TABLE} == {*COMMANDS}


@pytest.mark.parametrize("command", TABLE)
def test_an_example_is_understood(command: str):
    name, *arguments = shlex.split(TABLE[command])
    assert name == command
    COMMANDS[name].make_context(name, arguments)
