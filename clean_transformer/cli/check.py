"""The command `clean-transformer check`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from clean_transformer.cli import options
from clean_transformer.cli.terminal import open_console, print_written, progress, write_reproduction
from clean_transformer.support.dtypes import DTYPES, choose_dtype
from clean_transformer.support.files import STANDARD_OUTPUT


def check(
    target: Annotated[
        str,
        typer.Argument(
            help="A GPT-2, named as for --weights of parity; or FILE.py:FUNCTION, a function "
            "without arguments that returns an nn.Module. A function make_inputs in the same file "
            "returns its inputs: a tensor, a tuple, or a dict."
        ),
    ],
    implementation: Annotated[
        str,
        typer.Option(
            "--as",
            help="Which class runs a GPT-2: bridge (TransformerLens's TransformerBridge), hooked "
            "(its HookedTransformer), huggingface (the GPT2LMHeadModel of transformers), or ours. "
            "auto chooses the first that is installed.",
        ),
    ] = "auto",
    device: options.Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(DTYPES)}. Default: float32; a model from a file keeps its own."
        ),
    ] = None,
    compile_backend: options.CompileBackend = None,
    compile_dynamic: options.CompileDynamic = False,
    compile_mode: options.CompileMode = None,
    imports: options.Imports = None,
    json: options.JsonFile = None,
) -> None:
    """Check whether a device computes every operation of a model correctly.

    Runs the forward pass, the backward pass and `generate`, and compares each
    operation with the same operation in float64 on the CPU. Each call of compiled
    code counts as one operation; --compile-backend compiles the whole model. Writes
    a script in the current folder that reproduces the first fault.

    Exit status: 0 = PASS, 1 = WRONG or DEGRADED, 2 = could not run or ERROR,
    3 = something that you asked for was NOT CHECKED, 130 = interrupted.
    """
    from clean_transformer.parity.any_model.check import check_model
    from clean_transformer.parity.any_model.results import SCHEMA
    from clean_transformer.parity.any_model.target import load_target
    from clean_transformer.parity.any_model.terminal import print_model_report
    from clean_transformer.parity.report.terminal import styled
    from clean_transformer.parity.report.wording import script_file
    from clean_transformer.parity.verdict import Verdict
    from clean_transformer.support.devices import (
        choose_devices,
        import_packages,
        is_available,
        resolve_device,
    )
    from clean_transformer.support.files import require_folder

    require_folder(json)
    import_packages(imports or ())
    if (compile_dynamic or compile_mode) and not compile_backend:
        raise ValueError("--compile-dynamic and --compile-mode need --compile-backend")
    compilation = options.choose_compilation(compile_backend, compile_dynamic, compile_mode)
    chosen_dtype = None if dtype is None else choose_dtype(dtype)
    chosen_devices, console = choose_devices(device), open_console(stderr=json == STANDARD_OUTPUT)
    if len(chosen_devices) > 1:
        raise ValueError(f"check runs on one device, not {device!r}; name one")
    if not is_available(chosen_devices[0]):
        reason = f"{device}: this machine has no {device}"
        console.print(styled(Verdict.NOT_CHECKED), reason)
        raise typer.Exit(Verdict.NOT_CHECKED.exit_status)
    with progress() as on_step:
        on_step("loading the model")
        loaded = load_target(
            target, implementation, resolve_device(chosen_devices[0]), chosen_dtype
        )
        if compile_backend:
            loaded.model.compile(**asdict(compilation))
        report = check_model(loaded.model, loaded.inputs, on_step=on_step)
    script = None
    try:
        if json is not None:
            SCHEMA.write_json(report, json)
        if report.first_wrong and report.first_wrong.script:
            operation = report.first_wrong.operation.split(".")[1]
            script = script_file(operation, report.device, "-".join(report.dtypes))
            write_reproduction(Path(script), report.first_wrong.script)
    finally:  # a full disk does not hide the verdict
        print_model_report(report, loaded.title, console)
    if script is not None:
        console.print(f"reproduction: {script}")
    print_written(json)
    raise typer.Exit(report.verdict.exit_status)
