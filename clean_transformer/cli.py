"""The command line: one command per job."""

from pathlib import Path
from typing import Annotated
from warnings import catch_warnings, simplefilter

import typer
from rich.console import Console

from clean_transformer import cli_text, cli_train
from clean_transformer.terminal import one_line_errors, progress, read_text

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


for command in (cli_text.generate, cli_text.predict, cli_text.tokens, cli_text.info):
    app.command()(command)
app.command()(cli_train.train)


@app.callback()
def clean_transformer() -> None:
    """A readable GPT-2 whose every activation is proven equal to TransformerLens's."""


@app.command()
def parity(
    weights: Annotated[
        str | None,
        typer.Option(
            help="Hub id, alias, folder or file; 'stress' or 'plain' for synthetic ones, also with "
            "a size, as in 'stress:xl'. Default: gpt2, or 'stress' where the hub is out of reach."
        ),
    ] = None,
    devices: Annotated[
        str, typer.Option("--devices", "--device", help="auto, all, or some: cpu,cuda,mps")
    ] = "auto",
    dtypes: Annotated[
        str,
        typer.Option("--dtypes", "--dtype", help="all, or some: float64,float32,bfloat16,float16"),
    ] = "float32",
    modes: Annotated[
        str, typer.Option("--modes", "--mode", help="all, or some: eager,compiled,autocast")
    ] = "eager",
    reference: Annotated[
        str, typer.Option(help="bridge, hooked, huggingface; auto takes the one installed; none")
    ] = "auto",
    rows: Annotated[bool, typer.Option("--rows", help="Print every row.")] = False,
    worst: Annotated[int, typer.Option(help="Print this many rows, the worst first.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
) -> None:
    """Compare every activation with a reference, and measure every device's own error.

    Exit status: 0 PASS, 1 WRONG or DEGRADED, 2 could not run, 3 something NOT CHECKED.
    """
    from clean_transformer.files import write_atomically
    from clean_transformer.parity.choices import (
        choose_devices,
        choose_dtypes,
        choose_modes,
        choose_weights,
    )
    from clean_transformer.parity.html import write_html
    from clean_transformer.parity.references import choose_reference
    from clean_transformer.parity.report import print_report, script_name, write_json
    from clean_transformer.parity.suite import run_suite

    with one_line_errors():
        chosen_devices, chosen_dtypes = choose_devices(devices), choose_dtypes(dtypes)
        chosen_modes = choose_modes(modes)
        chosen_reference, no_reference = choose_reference(reference)
        with progress() as on_step:
            on_step("reading the weights")
            report = run_suite(
                choose_weights(weights),
                chosen_devices,
                chosen_dtypes,
                chosen_modes,
                reference=chosen_reference,
                no_reference=no_reference,
                on_step=on_step,
            )
        print_report(report, Console(), worst_rows=worst, all_rows=rows)
        if json is not None:
            write_json(report, json)
        if html is not None:
            write_html(report, html)
        for run in report.runs:
            if run.located:
                write_atomically(Path(script_name(run)), run.located.script)
    raise typer.Exit(report.verdict.exit_status)


@app.command()
def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16")] = "float32",
    weights: Annotated[str | None, typer.Option(help="As for parity.")] = None,
) -> None:
    """Say in plain words whether this device computes GPT-2 correctly, within a minute.

    Needs no other implementation. Exit status as for parity.
    """
    from clean_transformer.device import is_available
    from clean_transformer.files import write_atomically
    from clean_transformer.parity.choices import (
        DTYPES,
        choose_devices,
        choose_dtypes,
        choose_weights,
    )
    from clean_transformer.parity.report import print_diagnosis, script_name
    from clean_transformer.parity.suite import check_device

    with one_line_errors():
        [chosen_device], [chosen_dtype] = choose_devices(device), choose_dtypes(dtype)
        with progress() as on_step:
            on_step("reading the weights")
            chosen_weights = choose_weights(weights)
            run = check_device(chosen_weights, chosen_device, DTYPES[chosen_dtype], on_step=on_step)
        absent = [kind for kind in ("cuda", "mps") if not is_available(kind)]
        print_diagnosis(run, absent, chosen_weights.title, Console())
        if run.located:
            write_atomically(Path(script_name(run)), run.located.script)
    raise typer.Exit(run.verdict.exit_status)


@app.command("swap")
def swap_modules(
    text: Annotated[
        str | None, typer.Argument(help="What to read. Default: ids spread over the vocabulary.")
    ] = None,
    *,
    module: Annotated[
        str, typer.Option(help="Where: embed, blocks.3.attn, 'blocks.[3-7].mlp', 'blocks.*', …")
    ],
    with_: Annotated[
        str,
        typer.Option(
            "--with",
            help="variants.NAME, or FILE.py:NAME for a class of your own, made with the Config, "
            "or a function of the old module and its path.",
        ),
    ],
    weights: Annotated[str | None, typer.Option(help="As for parity.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16")] = "float32",
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
) -> None:
    """Put other modules in the place of some, and show what that changes.

    Exit status: 0, or 2 where it could not be done.
    """
    from clean_transformer.device import resolve_device
    from clean_transformer.effect import effect
    from clean_transformer.effect_report import print_effect, write_html, write_json
    from clean_transformer.makes import chosen_make
    from clean_transformer.model import DemoTransformer
    from clean_transformer.parity.choices import (
        DTYPES,
        choose_dtypes,
        choose_tokens,
        choose_weights,
    )
    from clean_transformer.swap import HookPointsLost, swap

    with one_line_errors(), chosen_make(with_) as make:
        chosen_device, [chosen_dtype] = resolve_device(device), choose_dtypes(dtype)
        with progress() as on_step:
            on_step("reading the weights")
            chosen = choose_weights(weights)
            tokens, read = choose_tokens(text, weights, chosen.cfg)
            model = DemoTransformer.from_state_dict(chosen.state, chosen.cfg)
            model.to(chosen_device, DTYPES[chosen_dtype])
            on_step("running the model as it was, and swapped")
            with catch_warnings():
                simplefilter("ignore", HookPointsLost)  # the report has them
                swapped = swap(model, module, make)
            report = effect(model, swapped, tokens.to(chosen_device), f"{chosen.title}; on {read}")
        print_effect(report, Console())
        if json is not None:
            write_json(report, json)
        if html is not None:
            write_html(report, html)


@app.command()
def explain(
    html: Annotated[Path, typer.Option(help="Write the page here.")],
    text: cli_text.TextArgument = None,
    file: cli_text.FileOption = None,
    weights: cli_text.WeightsOption = None,
    device: cli_text.DeviceOption = "auto",
    dtype: cli_text.DtypeOption = "float32",
) -> None:
    """Show on one page what a model makes of a text: predictions, attention, layer by layer."""
    from clean_transformer.explain import explain, write_html
    from clean_transformer.files import require_folder

    with one_line_errors():
        require_folder(html)
        read = read_text(text, file)
        with progress() as on_step:
            on_step("reading the weights")
            model = cli_text.load(weights, device, dtype)
            on_step("reading the text")
            write_html(explain(model, read), html)
        print(f"wrote {html}")


def main() -> None:
    """The console script."""
    app()
