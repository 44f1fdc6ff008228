"""Options that come from the fields of a dataclass."""

from dataclasses import dataclass, fields
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from clean_transformer.cli import app
from clean_transformer.cli.options import options_from
from clean_transformer.text.settings import Sampling
from clean_transformer.training.settings import Training


@dataclass(kw_only=True)
class Cooking:
    minutes: Annotated[int, "How long to cook."]
    salt_grams: Annotated[float, "How much salt."] = 1.5
    stir: Annotated[bool, "Stir all the time."] = False
    sauce: Annotated[str | None, "Which sauce."] = None


def run(*arguments: str) -> tuple[int, str, list[Any]]:
    cooked: list[Any] = []

    @options_from(Cooking, panel="Cooking")
    def cook(dish: str, plates: int = 1, **settings: Any) -> None:
        cooked.extend([dish, plates, Cooking(**settings)])

    own = typer.Typer()
    own.command()(cook)
    result = CliRunner().invoke(own, arguments)
    return result.exit_code, result.output, cooked


def test_every_field_is_an_option_with_its_type_and_default():
    _, _, cooked = run("soup", "--minutes", "3")
    assert cooked == ["soup", 1, Cooking(minutes=3)]
    given = ("--salt-grams", "2", "--stir", "--sauce", "hot", "--plates", "2")
    assert run("soup", "--minutes", "3", *given)[2] == [
        *("soup", 2, Cooking(minutes=3, salt_grams=2.0, stir=True, sauce="hot"))
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("soup",), "Missing option '--minutes'"),
        (("soup", "--minutes", "x"), "Invalid value for '--minutes'"),
        (("soup", "--minutes", "3", "--no-stir"), "No such option"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[str, ...], message: str):
    status, output, cooked = run(*arguments)
    assert status == 2
    assert message in output
    assert cooked == []


def test_the_help_has_a_panel_of_their_own():
    output = run("--help")[1]
    for said in ("─ Cooking ─", "How long to cook.", "[default: 1.5]", "[required]"):
        assert said in output
    assert "settings" not in output


@pytest.mark.parametrize(("command", "settings"), [("train", Training), ("generate", Sampling)])
def test_commands_have_every_setting(command: str, settings: type):
    output = CliRunner().invoke(app, [command, "--help"]).output
    for field in fields(settings):
        assert f"--{field.name.replace('_', '-')} " in output
