"""Sentences for the report in the terminal, the report on the HTML page, and `assert_parity`."""

from clean_transformer.analysis.comparison import LOGITS
from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import PATHS, Isolated
from clean_transformer.parity.locate import Located
from clean_transformer.parity.results import DeviceRun, UseSummary
from clean_transformer.parity.verdict import Check, Verdict

# The keys are the lower precisions that a device may use for float32 products. `describe` adds the
# text to its sentence about a row whose errors are those of this precision.
PRECISION_SETTINGS = {
    "TF32": "; the errors are those of TF32: turn off torch.backends.cuda.matmul.allow_tf32, "
    "or call torch.set_float32_matmul_precision('highest')",
    "bfloat16": "; the errors are those of bfloat16: turn off autocast, or call "
    "torch.set_float32_matmul_precision('highest')",
}


def group_of(name: str) -> str:
    """The group of the activation `name` in the report.

    For an activation inside a block, the group is the block, such as "block 3". For all other
    activations, the group is "outside".
    """
    parts = name.split(".")
    return f"block {parts[1]}" if parts[0] == "blocks" else "outside"


def run_name(run: DeviceRun) -> str:
    """The device, dtype and mode of a run, such as "cpu float32". "eager" is not mentioned."""
    mode = "" if run.mode == "eager" else f", {run.mode}"
    return f"{run.device} {run.dtype}{mode}"


def script_name(run: DeviceRun) -> str:
    """The file name of the script that reproduces the first wrong operation of a run."""
    operation = run.located.operation.split(".")[1] if run.located else "nothing"
    return script_file(operation, run.device, run.dtype)


def script_file(operation: str, device: str, dtype: str) -> str:
    """The file name of a script that reproduces an error of `operation`, such as "mm"."""
    return f"reproduce-{operation}-{device.replace(':', '')}-{dtype}.py"


def located_lines(located: Located) -> list[str]:
    """Return lines about the first wrong operation, its operands, and the matching known issues."""
    return [
        f"   {located.operation}, in {located.where}: error {located.ratio:.3g} roundings, "
        f"{located.bits:.1f} correct bits; {located.diagnosis}",
        *(f"     {operand}" for operand in located.operands),
        *(f"   matches the known issue {known}" for known in located.known),
    ]


def describe(row: Isolated | EndToEnd | Check) -> str:
    """Describe a row or a check that did not pass, in one sentence without a period."""
    if isinstance(row, EndToEnd):
        return (
            f"{row.name} (end to end): error {row.rho:.3g} times that of healthy CPU runs, "
            f"healthy up to {row.healthy:g}"
        )
    if isinstance(row, Check):
        allowed = "" if row.allowed is None else f", allowed {row.allowed:.3g}"
        return f"{row.name}: {row.measured:.3g}{allowed}; {row.note}".removesuffix("; ")
    in_model = row.path in PATHS
    where = "; ".join(filter(None, (row.operation, row.case)))
    path = f", {row.path}" if in_model else ""
    head = worst_head(row)
    return (
        f"{row.name or LOGITS} ({where}{path}): error {row.ratio:.3g} roundings, healthy up to "
        f"{row.healthy:.3g}; {row.bits:.1f} correct bits; worst at {[*row.worst_index]}"
        f"{head and f', head {head}'}{PRECISION_SETTINGS.get(row.lower_precision, '')}"
    )


def use_line(use: UseSummary) -> str:
    """Return one line about a use of the model: its name and what a person does in it.

    If `use.wrong_from` is set, the line also says from which position on the use is wrong.
    """
    where = f", wrong from position {use.wrong_from} on" if use.wrong_from else ""
    return f"{use.name}: {use.means}{where}"


def meaning(uses: list[UseSummary]) -> str:
    """Say which uses of the model are wrong on the device, and which uses are right.

    DEGRADED uses are called wrong too. Returns "" if no use is WRONG or DEGRADED.
    """
    bad = [use for use in uses if use.verdict in (Verdict.WRONG, Verdict.DEGRADED)]
    good = [use.means for use in uses if use.verdict is Verdict.PASS]
    if not bad:
        return ""
    said = (
        use.means + (f" (from position {use.wrong_from} on)" if use.wrong_from else "")
        for use in bad
    )
    return f"Wrong: {', '.join(said)}. Right: {', '.join(good) or 'nothing'}."


def worst_head(row: Isolated) -> str:
    """The index of the head with the largest ratio, as text; "" if the row has no heads."""
    return str(row.per_head.index(row.ratio)) if row.ratio in row.per_head else ""
