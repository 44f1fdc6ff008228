"""Prints a parity report in a terminal."""

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from clean_transformer.analysis.comparison import LOGITS
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.report.squares import STYLES, isolated_map
from clean_transformer.parity.report.summary import failed, kinds, places
from clean_transformer.parity.report.wording import (
    ANOTHER_FUNCTION,
    describe,
    located_lines,
    meaning,
    script_name,
    use_line,
)
from clean_transformer.parity.results import DeviceRun, SuiteReport, UseSummary
from clean_transformer.parity.same_function import ParityReport
from clean_transformer.parity.verdict import Verdict, worst
from clean_transformer.reports.environment import build_lines, environment
from clean_transformer.reports.heat_map import rank
from clean_transformer.reports.terminal import FoldingTable, heat_map_table

# What is printed before a check whose verdict is ERROR or NOT CHECKED: FIRST before the first
# check that did not pass, and ALSO before the other checks.
FIRST = {Verdict.ERROR: "First error", Verdict.NOT_CHECKED: "First not checked"}
ALSO = {Verdict.ERROR: "Also an error", Verdict.NOT_CHECKED: "Also not checked"}

BETWEEN = (0, 2, 0, 0)  # the space around each cell of a table: two columns at its right


def _indented(table: Table) -> Padding:
    return Padding(table, (0, 0, 0, 2), expand=False)


def styled(verdict: Verdict) -> Text:
    """Return the verdict as text in its color."""
    return Text(verdict.value, style=STYLES[verdict])


def print_report(
    report: SuiteReport, console: Console, *, worst_rows: int = 0, all_rows: bool = False
) -> None:
    """Print the report of `clean-transformer parity`.

    If `worst_rows` is above 0, also print tables of activations and their errors. Each table has
    the `worst_rows` rows with the largest errors. If `worst_rows` is 0 and `all_rows` is True,
    print these tables with all rows.
    """
    console.print("\n".join(build_lines(report.environment)), markup=False, highlight=False)
    console.print(f"clean_transformer on {report.weights}", markup=False)
    console.print(Text("verdict: ").append_text(styled(report.verdict)))
    if report.same_verdict.is_bad:
        console.print(ANOTHER_FUNCTION)
    for run in report.runs:
        if meaning(run):
            console.print(f"{run.title}: {meaning(run)}", markup=False)
    console.print()
    console.print(_same_function(report))
    if report.same_function and (worst_rows or all_rows):
        console.print(_comparison_rows(report.same_function, worst_rows))
    for run in report.runs:
        console.print()
        console.print(_device_run(run))
        if run.isolated and (worst_rows or all_rows):
            console.print(_isolated_rows(run.isolated, worst_rows))
    console.print()
    console.print(Text("verdict: ").append_text(styled(report.verdict)))


def print_diagnosis(run: DeviceRun, weights: str, console: Console) -> None:
    """Print the result of `clean-transformer doctor` for one device, in plain words.

    `weights` says which weights the model has, such as "demo".
    """
    build = "\n".join(build_lines(environment()))
    console.print(f"{run.device} in {run.dtype}: {build}", markup=False, highlight=False)
    console.print(f"GPT-2 with {weights}", markup=False)
    if run.not_checked:
        console.print(styled(Verdict.NOT_CHECKED), f"{run.device}: {run.not_checked}")
        return
    checked = len(run.isolated) + len(run.end_to_end) + len(run.invariants) + len(run.probes)
    checked += sum(len(result.rows) for result in run.uses)
    words = {
        Verdict.PASS: f"{run.device} computes GPT-2 correctly in {run.dtype}.",
        Verdict.NOT_CHECKED: f"{run.device} computes GPT-2 correctly as far as it was checked.",
        Verdict.ERROR: f"{run.device} could not run everything. Nothing that ran was wrong.",
        Verdict.DEGRADED: f"{run.device} computes GPT-2 less accurately than {run.dtype} should.",
        Verdict.WRONG: f"{run.device} computes GPT-2 wrongly. Do not trust its results.",
    }
    console.print(styled(run.verdict), words[run.verdict])
    if meaning(run):
        console.print(meaning(run), markup=False)
    if run.by_use:
        console.print(uses_table(run.by_use))
    console.print(
        f"{checked:,} checks: the error of each activation and of each part in every use, the "
        "drift of the whole run, invariants, single operations"
    )
    first = run.first_failure
    if first:
        label = FIRST.get(first.verdict, "First failure")
        console.print(f"{label}: {describe(first)}", markup=False)
    checks = failed([*run.invariants, *run.probes, *run.errors])
    broken = [check for check in checks if check != first]
    for check in sorted(broken, key=lambda check: -check.verdict.severity)[:5]:
        label = ALSO.get(check.verdict, "Also broken")
        console.print(f"{label}: {describe(check)}", markup=False)
    if run.located:
        console.print("\n".join(located_lines(run.located)), markup=False, highlight=False)
        console.print(f"   reproduction: {script_name(run)}")


def uses_table(uses: list[UseSummary]) -> Table:
    """Return a table of the verdicts on each use of the model, such as generating text."""
    table = FoldingTable(box=None, show_header=False, padding=BETWEEN)
    for use in uses:
        table.add_row(styled(use.verdict), Text(use_line(use)))
    return table


def _same_function(report: SuiteReport) -> RenderableType:
    heading = Text("1. Is it the same function?  ", style="bold")
    same = report.same_function
    if same is None:
        heading.append_text(styled(report.same_verdict))
        return Group(heading, Text(f"   {report.no_reference}"))
    compared, cached = same.coverage
    heading.append_text(styled(same.verdict))
    summary = (
        f"   compared with {same.reference} in float64 on the CPU: {compared} of its {cached} "
        f"cached activations ({100 * compared / cached:.0f}%)"
    )
    table = FoldingTable("", "keys", "largest error / scale", box=None, padding=BETWEEN)
    table.add_column("at")
    table.add_column("")
    for place, rows in places(same.rows).items():
        error, verdict = f"{rows[0].error:.1e}", styled(worst(row.verdict for row in rows))
        table.add_row(place, str(len(rows)), error, rows[0].key, verdict)
    skipped = [
        Text(f"   NOT CHECKED {row.key}: {row.note}", style=STYLES[Verdict.NOT_CHECKED])
        for row in same.rows
        if not row.name
    ]
    first = same.first_failure
    where = []
    if first:
        at = f"{first.key}, {first.case}" if first.case else first.key
        where.append(Text(f"   First failure: {at}", style="bold"))
    read_by = [Text(f"   {same.weights}")] if same.weights else []
    return Group(heading, Text(summary), *read_by, _indented(table), *where, *skipped)


def _comparison_rows(same: ParityReport, worst_rows: int) -> Table:
    rows = same.rows
    if worst_rows:
        rows = sorted(rows, key=lambda row: -rank(row.error))[:worst_rows]
    table = FoldingTable(
        Column("their key", no_wrap=True),
        *("ours", "largest error / scale", "scale", ""),
        box=None,
        padding=(0, 1, 0, 0),
    )
    for row in rows:
        numbers = (f"{row.error:.1e}", f"{row.scale:.2e}")
        table.add_row(row.key, row.name, *numbers, styled(row.verdict))
    return table


def _device_run(run: DeviceRun) -> RenderableType:
    how = "" if run.mode == "eager" else f", {run.mode}"
    heading = Text(f"2. Does {run.device} compute {run.dtype}{how} accurately?  ", style="bold")
    heading.append_text(styled(run.verdict))
    if run.not_checked:
        return Group(heading, Text(f"   {run.not_checked}"))
    parts: list[RenderableType] = [heading]
    parts.append(Text("   " + ", ".join(f"{key}: {value}" for key, value in run.settings.items())))
    parts.append(_indented(uses_table(run.by_use)))
    if run.isolated:
        heat_map = heat_map_table({"worst ratio": isolated_map(run)})
        parts += [_indented(heat_map), _indented(_kinds(run.isolated))]
    parts.append(_indented(_checks(run)))
    parts += [Text(f"   {error.verdict.value} {describe(error)}") for error in run.errors]
    drift = max(run.end_to_end, key=lambda row: rank(row.rho), default=None)
    if drift:
        parts.append(
            Text(
                f"   end to end: up to {drift.rho:.2f} times the error of random rounding, at "
                f"{drift.name}; healthy up to {drift.healthy:g}"
            )
        )
    if run.impact:
        parts.append(
            Text(
                f"   effect: {run.impact.top1_flips} of {run.impact.positions} top-1 "
                f"predictions flipped, KL divergence {run.impact.kl_divergence:.1e} nats, "
                f"{run.impact.loss_in_words('+.1e')}"
            )
        )
    first = run.first_failure
    if first:
        bad = "3. Where does it first go wrong?"
        label = bad if first.verdict.is_bad else f"{FIRST[first.verdict]}:"
        parts.append(Text(f"{label}  {describe(first)}", style="bold"))
    if run.located:
        parts += [
            Text("\n".join(located_lines(run.located))),
            Text(f"   reproduction: {script_name(run)}"),
        ]
    return Group(*parts)


def _kinds(rows: list[Isolated]) -> Table:
    table = FoldingTable("operation", "activations", "ratio", "healthy", box=None, padding=BETWEEN)
    table.add_column("at")
    for operation, (count, worst_row) in kinds(rows).items():
        table.add_row(
            operation,
            str(count),
            f"{worst_row.ratio:.3g}",
            f"≤ {worst_row.healthy:.3g}",
            f"{worst_row.name or LOGITS} ({worst_row.case}, {worst_row.path})",
        )
    return table


def _checks(run: DeviceRun) -> Table:
    table = FoldingTable("invariant", "difference", "allowed", "", "", box=None, padding=BETWEEN)
    for check in run.invariants:
        numbers = (_figure(check.measured, ".1e"), _figure(check.allowed, ".1e"))
        table.add_row(check.name, *numbers, styled(check.verdict), check.note)
    if run.probes:
        title = f"{len(run.probes)} single operations"
        table.add_row(title, "", "", styled(worst(probe.verdict for probe in run.probes)), "")
    for probe in failed(run.probes):
        table.add_row(
            f"  {probe.name}",
            _figure(probe.measured, ".3g"),
            "",
            styled(probe.verdict),
            probe.note,
        )
    return table


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _isolated_rows(rows: list[Isolated], worst_rows: int) -> Table:
    if worst_rows:
        rows = sorted(rows, key=lambda row: -row.ratio)[:worst_rows]
    table = FoldingTable(
        Column("activation", no_wrap=True),
        *("case", "path", "operation", "ratio", "bits", ""),
        box=None,
        padding=(0, 1, 0, 0),
    )
    for row in rows:
        numbers = (f"{row.ratio:.3g}", f"{row.bits:.1f}")
        label = (row.name or LOGITS, row.case, row.path, row.operation)
        table.add_row(*label, *numbers, styled(row.verdict))
    return table
