"""Prints the result of `check_model` in a terminal."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clean_transformer.parity.any_model.paths import MODEL, OUTSIDE
from clean_transformer.parity.any_model.results import ModelReport, Row, alike, summed
from clean_transformer.parity.report.terminal import styled, uses_table
from clean_transformer.parity.report.wording import located_lines, uses_by_verdict
from clean_transformer.parity.verdict import Verdict
from clean_transformer.reports.environment import build_lines
from clean_transformer.reports.terminal import FoldingTable

HEADLINES = {
    Verdict.PASS: "{device} computes {model} correctly.",
    Verdict.NOT_CHECKED: "no error was found, but not everything could be checked.",
    Verdict.ERROR: "{model} raised an exception.",
    Verdict.DEGRADED: "{device} computes {model} less accurately than it should.",
    Verdict.WRONG: "{device} computes {model} wrongly. Do not trust its results.",
}
WRONG_CACHE = (
    "{model} computes other outputs with its cache than without it. Do not trust the text that it "
    "generates."
)
# Why a call was compared, and yet reads NOT CHECKED.
UNPROVEN = (
    "errors of up to {ratio:.3g} roundings; there is no rule that says which errors of this "
    "operation are healthy"
)


def print_model_report(report: ModelReport, title: str, console: Console) -> None:
    """Print the verdicts, the first wrong call, and tables of the operations and of the modules.

    `title` says where the model comes from.
    """
    lines = build_lines(report.environment)
    lines[0] = f"{report.device} in {', '.join(report.dtypes) or 'no float dtype'}: {lines[0]}"
    console.print("\n".join(lines), markup=False, highlight=False)
    console.print(f"{report.model} of {title}; inputs: {report.inputs}", markup=False)
    is_cache = report.verdict is Verdict.WRONG and report.of_calls is not Verdict.WRONG
    headline = WRONG_CACHE if is_cache else HEADLINES[report.verdict]
    said = headline.format(device=report.device, model=report.model)
    console.print(styled(report.verdict), Text(said))
    if report.verdict is not Verdict.PASS:
        console.print(uses_by_verdict(report.by_use), markup=False)
    console.print(uses_table(report.by_use))
    for name, reason in report.absent.items():
        console.print(f"no {name}: {reason}", markup=False)
    _print_not_checked(report, console)
    if not report.rows:
        return
    if report.first_wrong:
        console.print(f"First {report.of_calls.value} call:", style="bold")
        console.print("\n".join(located_lines(report.first_wrong)), markup=False, highlight=False)
    console.print()
    _print_rows(report, console)


def _print_not_checked(report: ModelReport, console: Console) -> None:
    unchecked = [row for row in report.rows if row.not_checked]
    for operation, (total, _) in summed(unchecked, lambda row: row.operation).items():
        said = f"{operation}: {total.not_checked:,} calls"
        if total.ratio:
            said += f", {UNPROVEN.format(ratio=total.ratio)}"
        console.print(styled(Verdict.NOT_CHECKED), said)


def _print_rows(report: ModelReport, console: Console) -> None:
    rounding = [row for row in report.rows if row.ratio or row.verdict is not Verdict.PASS]
    # The model may choose another dtype for some of its operations.
    several = len({row.dtype for row in rounding}) > 1

    def operation(row: Row) -> str:
        return f"{row.operation} {row.dtype}".rstrip() if several else row.operation

    by_operation = summed(rounding, operation)
    console.print(_table("operation", by_operation, "worst in", lambda row: row.module))
    seen = {row.operation for row in report.rows} - {row.operation for row in rounding}
    console.print(f"{len(seen)} other operations, whose results have no rounding error, are right.")
    console.print()
    by_module = summed(rounding, lambda row: alike(row.module))
    console.print(_table("module", by_module, "worst operation", lambda row: row.operation))
    calls = sum(row.calls - row.not_checked for row in report.rows)
    console.print(
        f"{calls:,} calls were checked. The ratio is the error in roundings; bits are correct "
        f"bits. {MODEL} is the model's own forward; {OUTSIDE} is outside of it, such as the loss.",
        markup=False,
        highlight=False,
    )


def _table(
    heading: str, sums: dict[str, tuple[Row, Row]], place: str, where: Callable[[Row], str]
) -> Table:
    table = FoldingTable(heading, "calls", "ratio", "bits", "", box=None, padding=(0, 2, 0, 0))
    table.add_column(place)
    for name, (total, worst_row) in sums.items():
        bits = f"{total.bits:.1f}" if abs(total.bits) < float("inf") else ""
        numbers = (f"{total.calls:,}", f"{total.ratio:.3g}", bits)
        table.add_row(name, *numbers, styled(total.verdict), where(worst_row))
    return table
