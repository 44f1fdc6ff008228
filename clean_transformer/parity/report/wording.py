"""TODO parity/report/wording."""

from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.locate import Located
from clean_transformer.parity.results import DeviceRun

# What makes a device compute float32 products in less, and how to turn it off.
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


def script_name(run: DeviceRun) -> str:
    """The file name of a run's reproduction script."""
    operation = run.located.operation.split(".")[1] if run.located else "nothing"
    return f"reproduce-{operation}-{run.device.replace(':', '')}-{run.dtype}.py"


def located_lines(located: Located) -> list[str]:
    """The operation, its operands and the known faults that it matches, a line each."""
    return [
        f"   {located.operation}, in {located.where}: error {located.ratio:.3g} roundings, "
        f"{located.bits:.1f} bits; {located.diagnosis}",
        *(f"     {operand}" for operand in located.operands),
        *(f"   matches the known fault {known}" for known in located.known),
    ]


def describe(row: Isolated) -> str:
    """One bad row in a sentence."""
    heads = [head for head, ratio in enumerate(row.per_head) if ratio == row.ratio]
    head = f", head {heads[0]}" if heads else ""
    lower = PRECISION_SETTINGS.get(row.lower_precision, "")
    return (
        f"{row.name or 'logits'} ({row.operation}; {row.case}, {row.path}): error {row.ratio:.3g} "
        f"roundings where {row.healthy:.3g} are healthy, {row.bits:.1f} bits, "
        f"worst at {[*row.worst_index]}{head}{lower}"
    )
