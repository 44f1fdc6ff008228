"""The commands `clean-transformer parity` and `clean-transformer doctor`."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clean_transformer.cli import options
from clean_transformer.cli.terminal import open_console, print_written, progress, write_reproduction
from clean_transformer.parity.modes import MODES, choose_modes
from clean_transformer.support.dtypes import DTYPES, choose_dtype, choose_dtypes
from clean_transformer.support.files import STANDARD_OUTPUT

if TYPE_CHECKING:
    from clean_transformer.parity.modes import Compilation
    from clean_transformer.parity.results import DeviceRun


def parity(
    weights: options.WeightsOrSynthetic = None,
    devices: options.Devices = "auto",
    dtypes: Annotated[
        str,
        typer.Option(
            "--dtypes",
            "--dtype",
            help=f"One or more, with commas between: {', '.join(DTYPES)}; or all.",
        ),
    ] = "float32",
    modes: Annotated[
        str,
        typer.Option(
            "--modes",
            "--mode",
            help="How the model runs. One or more, with commas between: "
            f"{', '.join(MODES)}; or all.",
        ),
    ] = "eager",
    reference: Annotated[
        str,
        typer.Option(
            help="What to compare with: bridge (TransformerLens's TransformerBridge), hooked (its "
            "HookedTransformer), huggingface (the GPT2LMHeadModel of transformers), or none. auto "
            "chooses the first that is installed."
        ),
    ] = "auto",
    compile_backend: options.CompileBackend = None,
    compile_dynamic: options.CompileDynamic = False,
    compile_mode: options.CompileMode = None,
    imports: options.Imports = None,
    rows: Annotated[bool, typer.Option("--rows", help="Print every row.")] = False,
    worst: Annotated[
        int, typer.Option(min=0, help="Print this many rows, those with the largest errors first.")
    ] = 0,
    json: options.JsonFile = None,
    html: options.HtmlFile = None,
) -> None:
    """Compare every activation of GPT-2 with a reference implementation, then check each device.

    The check of a device compares the device with the CPU in float64. Writes
    scripts in the current folder that reproduce the first faults.

    Exit status: 0 = PASS, 1 = WRONG or DEGRADED, 2 = could not run or ERROR,
    3 = something that you asked for was NOT CHECKED, 130 = interrupted.
    """
    from clean_transformer.parity.inputs import choose_weights
    from clean_transformer.parity.references.choose import choose_reference
    from clean_transformer.parity.report.json import write_json
    from clean_transformer.parity.report.page import write_html
    from clean_transformer.parity.report.terminal import print_report
    from clean_transformer.parity.suite import number_of_steps, run_suite
    from clean_transformer.support.devices import choose_devices, import_packages
    from clean_transformer.support.files import require_folder

    require_folder(json, html)
    import_packages(imports or ())
    chosen_devices, chosen_dtypes = choose_devices(devices), choose_dtypes(dtypes)
    chosen_modes = choose_modes(modes)
    compilation = _compilation(compile_backend, compile_dynamic, compile_mode, chosen_modes)
    chosen_reference, no_reference = choose_reference(reference)
    with progress() as on_step:
        on_step("reading the weights")
        chosen_weights = choose_weights(weights)
    n_runs = len(chosen_devices) * len(chosen_dtypes) * len(chosen_modes)
    total = 1 + n_runs * number_of_steps(chosen_weights.cfg)
    with progress(total, stays=False) as on_step:
        report = run_suite(
            chosen_weights,
            chosen_devices,
            chosen_dtypes,
            chosen_modes,
            compilation=compilation,
            reference=chosen_reference,
            no_reference=no_reference,
            on_step=counted(on_step),
        )
    try:
        if json is not None:
            write_json(report, json)
        if html is not None:
            write_html(report, html)
        for run in report.runs:
            write_script(run)
    finally:  # a full disk does not hide the verdict
        print_report(
            report, open_console(stderr=json == STANDARD_OUTPUT), worst_rows=worst, all_rows=rows
        )
    print_written(json, html)
    raise typer.Exit(report.verdict.exit_status)


def doctor(
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    weights: options.WeightsOrSynthetic = None,
    compile_backend: options.CompileBackend = None,
    compile_dynamic: options.CompileDynamic = False,
    compile_mode: options.CompileMode = None,
    imports: options.Imports = None,
    json: options.JsonFile = None,
) -> None:
    """Say in plain words whether a device computes GPT-2 correctly. Takes about a minute.

    Compares the device with the CPU in float64; needs no other implementation. With
    --compile-backend, every module of the model is compiled.
    Writes a script in the current folder that reproduces the first fault.

    Exit status: 0 = PASS, 1 = WRONG or DEGRADED, 2 = could not run or ERROR,
    3 = something that you asked for was NOT CHECKED, 130 = interrupted.
    """
    from clean_transformer.parity.inputs import choose_weights
    from clean_transformer.parity.report.json import write_json
    from clean_transformer.parity.report.terminal import print_diagnosis
    from clean_transformer.parity.suite import check_device, number_of_steps, report_on
    from clean_transformer.support.devices import choose_devices, import_packages
    from clean_transformer.support.files import require_folder

    require_folder(json)
    import_packages(imports or ())
    mode = "compiled" if compile_backend else "eager"
    compilation = _compilation(compile_backend, compile_dynamic, compile_mode, [mode])
    chosen_devices, chosen_dtype = choose_devices(device), choose_dtype(dtype)
    if len(chosen_devices) > 1:
        raise ValueError(
            f"doctor checks one device, not {device!r}; name one, or check several with "
            "`clean-transformer parity --devices`"
        )
    with progress() as on_step:
        on_step("reading the weights")
        chosen_weights = choose_weights(weights)
    with progress(number_of_steps(chosen_weights.cfg), stays=False) as on_step:
        run = check_device(
            chosen_weights,
            chosen_devices[0],
            chosen_dtype,
            mode=mode,
            compilation=compilation,
            on_step=counted(on_step),
        )
    try:
        if json is not None:
            write_json(report_on(chosen_weights, None, "doctor compares with none", [run]), json)
        write_script(run)
    finally:  # a full disk does not hide the verdict
        print_diagnosis(run, chosen_weights.title, open_console(stderr=json == STANDARD_OUTPUT))
    print_written(json)
    raise typer.Exit(run.verdict.exit_status)


def _compilation(
    backend: str | None, dynamic: bool, mode: str | None, modes: list[str]
) -> "Compilation":
    """Return the chosen `Compilation`. Raises `ValueError` if one of `modes` would ignore it."""
    compilation = options.choose_compilation(backend, dynamic, mode)
    if (backend or dynamic or mode) and modes != ["compiled"]:
        raise ValueError(
            "the options --compile-backend, --compile-dynamic and --compile-mode are for the mode "
            "compiled alone; add --mode compiled"
        )
    return compilation


def counted(on_step: Callable[[str, int], None]) -> Callable[[str], None]:
    """Return a function `f(step)` that calls `on_step(step, n)`; n counts the calls from 0."""
    done = count()
    return lambda step: on_step(step, next(done))


def write_script(run: "DeviceRun") -> None:
    """If the run found a fault, write a script in the current folder that reproduces the fault."""
    from clean_transformer.parity.report.wording import script_name

    if run.located and run.located.script:
        write_reproduction(Path(script_name(run)), run.located.script)
