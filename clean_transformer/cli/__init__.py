"""The command line. Each command is a function in the file with the command's name.

Only the command `doctor` is in another file, parity.py. Importing this package does not import
PyTorch, so that `--help` is fast.
"""

from typing import Annotated

import typer

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
from clean_transformer.cli.terminal import one_line_errors

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

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

for command in COMMANDS:
    app.command()(one_line_errors()(command))


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
    app()
