"""The command line. Each command is a function in the file with the command's name.

Only the command `doctor` is in another file, parity.py. Importing this package does not import
PyTorch, so that `--help` is fast.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from clean_transformer.cli import (
    bench,
    check,
    compare,
    explain,
    generate,
    info,
    notebook,
    parity,
    predict,
    swap,
    tokens,
    train,
)
from clean_transformer.cli.terminal import never_fail_to_print, one_line_errors

COMMANDS = (
    generate.generate,
    predict.predict,
    explain.explain,
    tokens.tokens,
    info.info,
    notebook.notebook,
    swap.swap,
    parity.parity,
    parity.doctor,
    check.check,
    bench.bench,
    compare.compare,
    train.train,
)

# What help texts say in place of typer's names for the types of options.
TYPES = {
    "<bool>": "",
    "<str>": "TEXT",
    "<list[str]>": "TEXT",
    "<path>": "PATH",
    "<list[Path]>": "PATH",
    "<int>": "NUMBER",
    "<int range>": "NUMBER",
    "<float>": "NUMBER",
}


class Command(TyperCommand):
    """A command whose help names the types of its options in plain words (see `TYPES`).

    If a text of several words has no quotes, the error message says that quotes are needed.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Read the arguments of the command line into `ctx`."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # a UsageError, whose module depends on the version of typer
            reads_text = any(param.name == "text" for param in self.get_params(ctx))
            if reads_text and "unexpected extra argument" in str(error):
                vars(error)["message"] += ". Put quotes around a text of several words"
            raise

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the command's options and arguments."""
        params: list[Any] = super().get_params(ctx)
        for param in params:
            if hasattr(param, "display_type_rich"):  # older versions of typer show other words
                shown = param.display_type_rich(ctx)
                word = TYPES.get(shown, shown)
                param.display_type_rich = lambda ctx, word=word: word
        return params


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

for command in COMMANDS:
    app.command(cls=Command)(one_line_errors()(command))


def print_version(wanted: bool) -> bool:
    """If `wanted` is True, print the version and exit. `--version` calls this function."""
    if wanted:
        from clean_transformer.support.version import __version__

        print(f"clean-transformer {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def clean_transformer(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """A readable GPT-2 whose every activation is proven equal to TransformerLens's.

    `clean-transformer COMMAND --help` shows the options of a command.
    """


def main() -> None:
    """Run the command that the user typed. `sys.argv` has the command and its options."""
    never_fail_to_print()
    app()
