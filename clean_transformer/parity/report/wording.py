"""The sentences that the terminal, the page and `assert_parity` have in common."""

from clean_transformer.analysis.comparison import LOGITS
from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import PATHS, Isolated
from clean_transformer.parity.locate import Located
from clean_transformer.parity.results import DeviceRun
from clean_transformer.parity.verdict import Check

# The settings that make a device multiply float32 matrices in a lower precision.
PRECISION_SETTINGS = {
    "TF32": ", as if computed in TF32: torch.backends.cuda.matmul.allow_tf32 or "
    "torch.set_float32_matmul_precision('high') is on; set 'highest' for float32",
    "bfloat16": ", as if computed in bfloat16: torch.set_float32_matmul_precision('medium') or "
    "autocast is on; set 'highest' for float32",
}


def group_of(name: str) -> str:
    """Where an activation is: "block 3", or "outside" of the blocks."""
    parts = name.split(".")
    return f"block {parts[1]}" if parts[0] == "blocks" else "outside"


def run_name(run: DeviceRun) -> str:
    """The device, the dtype and, unless it is eager, the mode."""
    mode = "" if run.mode == "eager" else f", {run.mode}"
    return f"{run.device} {run.dtype}{mode}"


def script_name(run: DeviceRun) -> str:
    """The file name of a run's reproduction script."""
    operation = run.located.operation.split(".")[1] if run.located else "nothing"
    return f"reproduce-{operation}-{run.device.replace(':', '')}-{run.dtype}.py"


def located_lines(located: Located) -> list[str]:
    """The operation, its operands and the known issues that it matches, one per line."""
    return [
        f"   {located.operation}, in {located.where}: error {located.ratio:.3g} roundings, "
        f"{located.bits:.1f} bits; {located.diagnosis}",
        *(f"     {operand}" for operand in located.operands),
        *(f"   matches the known fault {known}" for known in located.known),
    ]


def describe(row: Isolated | EndToEnd | Check) -> str:
    """One failure in a sentence."""
    if isinstance(row, EndToEnd):
        return (
            f"{row.name} (end to end): error {row.rho:.3g} times that of healthy runs on the CPU, "
            f"where {row.healthy:g} is healthy"
        )
    if isinstance(row, Check):
        return f"{row.name}: {row.measured:.3g} {row.note}".rstrip()
    head = worst_head(row)
    return (
        f"{row.name or LOGITS} ({row.operation}; {row.case}, {row.path}): error {row.ratio:.3g} "
        f"{unit(row)} where {row.healthy:.3g} are healthy, {row.bits:.1f} bits, "
        f"worst at {[*row.worst_index]}{head and f', head {head}'}"
        f"{PRECISION_SETTINGS.get(row.lower_precision, '')}"
    )


def unit(row: Isolated) -> str:
    """The unit of a row's ratio."""
    return "roundings" if row.path in PATHS else "times the error of the CPU"


def worst_head(row: Isolated) -> str:
    """The head with the largest error; "" if the activation has no heads."""
    return str(row.per_head.index(row.ratio)) if row.ratio in row.per_head else ""
