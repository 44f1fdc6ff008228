"""TODO cli/parity."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from clean_transformer.cli.terminal import one_line_errors, progress


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
        str,
        typer.Option(
            "--modes",
            "--mode",
            help="all, or some: eager,compiled,autocast,optimized,optimized-compiled",
        ),
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
    from clean_transformer.parity.inputs import choose_modes, choose_weights
    from clean_transformer.parity.references.choose import choose_reference
    from clean_transformer.parity.report.json import write_json
    from clean_transformer.parity.report.page import write_html
    from clean_transformer.parity.report.terminal import print_report
    from clean_transformer.parity.report.wording import script_name
    from clean_transformer.parity.suite import run_suite
    from clean_transformer.support.devices import choose_devices
    from clean_transformer.support.dtypes import choose_dtypes
    from clean_transformer.support.files import write_atomically

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


def doctor(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16")] = "float32",
    weights: Annotated[str | None, typer.Option(help="As for parity.")] = None,
) -> None:
    """Say in plain words whether this device computes GPT-2 correctly, within a minute.

    Needs no other implementation. Exit status as for parity.
    """
    from clean_transformer.parity.inputs import choose_weights
    from clean_transformer.parity.report.terminal import print_diagnosis
    from clean_transformer.parity.report.wording import script_name
    from clean_transformer.parity.suite import check_device
    from clean_transformer.support.devices import choose_devices, is_available
    from clean_transformer.support.dtypes import DTYPES, choose_dtypes
    from clean_transformer.support.files import write_atomically

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
