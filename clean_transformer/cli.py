"""The command line: one command per job."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def clean_transformer() -> None:
    """A readable GPT-2 whose every activation is proven equal to TransformerLens's."""


@app.command()
def parity(
    weights: Annotated[
        str | None,
        typer.Option(
            help="Hub id, alias or folder; 'stress' or 'plain' for synthetic ones, also with a "
            "size, as in 'stress:xl'. Default: gpt2, or 'stress' where the hub is out of reach."
        ),
    ] = None,
    devices: Annotated[
        str, typer.Option("--devices", "--device", help="auto, all, or some: cpu,cuda,mps")
    ] = "auto",
    dtypes: Annotated[
        str,
        typer.Option(
            "--dtypes", "--dtype", help="all, or some: float64,float32,bfloat16,float16"
        ),
    ] = "float32",
    reference: Annotated[
        str, typer.Option(help="bridge, hooked, huggingface; auto takes the one installed; none")
    ] = "auto",
    rows: Annotated[bool, typer.Option("--rows", help="Print every row.")] = False,
    worst: Annotated[int, typer.Option(help="Print this many rows, the worst first.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
) -> None:
    """Compare every activation with a reference, and measure every device's own error.

    Exit status: 0 PASS, 1 WRONG or DEGRADED, 2 could not run, 3 something NOT CHECKED.
    """
    from clean_transformer.parity.references import ReferenceUnavailable, installed_reference
    from clean_transformer.parity.report import print_report, write_json
    from clean_transformer.parity.suite import choose_devices, choose_dtypes, choose_weights, run_suite
    from clean_transformer.parity.references import choose_reference

    console = Console()
    with _or_exit():
        chosen_devices, chosen_dtypes = choose_devices(devices), choose_dtypes(dtypes)
