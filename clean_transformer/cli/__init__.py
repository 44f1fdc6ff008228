"""The command line: one command per job."""

import typer

from clean_transformer.cli.bench import bench
from clean_transformer.cli.compare import compare
from clean_transformer.cli.explain import explain
from clean_transformer.cli.parity import doctor, parity
from clean_transformer.cli.swap import swap_modules
from clean_transformer.cli.text import generate, info, predict, tokens
from clean_transformer.cli.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

for command in (generate, predict, tokens, info, train, parity, doctor, explain, bench, compare):
    app.command()(command)
app.command("swap")(swap_modules)


@app.callback()
def clean_transformer() -> None:
    """A readable GPT-2 whose every activation is proven equal to TransformerLens's."""


def main() -> None:
    """The console script."""
    app()
