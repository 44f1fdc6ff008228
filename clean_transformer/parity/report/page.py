"""Writes a parity report as one HTML file, which needs no network and no other files."""

from pathlib import Path

from clean_transformer.analysis.comparison import LOGITS
from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import PATHS, Isolated
from clean_transformer.parity.report.chart import depth_chart
from clean_transformer.parity.report.squares import SHARES, end_to_end_map, isolated_map
from clean_transformer.parity.report.summary import failed, kinds, places, worst_reference
from clean_transformer.parity.report.wording import (
    ANOTHER_FUNCTION,
    describe,
    meaning,
    use_line,
)
from clean_transformer.parity.results import DeviceRun, SuiteReport
from clean_transformer.parity.verdict import Check, Verdict, worst
from clean_transformer.reports.environment import build_lines
from clean_transformer.reports.page import render_page
from clean_transformer.support.files import write_atomically

MEANING = {
    Verdict.PASS: (
        "GPT-2 is computed correctly.",
        "The model is the same function as its reference. Every device below computes it as "
        "accurately as its dtype allows.",
    ),
    Verdict.NOT_CHECKED: (
        "Nothing wrong was found, but not everything was checked.",
        "Everything that was checked passed. What is listed here may be right or wrong.",
    ),
    Verdict.ERROR: (
        "Nothing wrong was found, but some checks could not run.",
        "They raised an exception. What is listed here may be right or wrong.",
    ),
    Verdict.DEGRADED: (
        "GPT-2 is computed less accurately than it should be.",
        "The errors are larger than on a healthy device, or are those of a lower precision.",
    ),
    Verdict.WRONG: (
        "GPT-2 is computed wrongly.",
        "Some errors are larger than rounding can explain. Do not trust these results.",
    ),
}


def write_html(report: SuiteReport, file: Path) -> None:
    """Write the report to `file` as an HTML page. If writing fails, `file` stays as it was."""
    write_atomically(file, render(report))


def render(report: SuiteReport) -> str:
    """Return the HTML page of the report, as text."""
    return render_page(
        "parity.html.jinja",
        report=report,
        build=build_lines(report.environment),
        meaning=MEANING[report.verdict],
        not_checked=Verdict.NOT_CHECKED,
        paths=PATHS,
        degraded=Verdict.DEGRADED,
        shares=SHARES,
        reasons=reasons(report),
        places=places,
        kinds=kinds,
        describe=describe,
        use_line=use_line,
        sentence=meaning,
        worst=lambda rows: worst(row.verdict for row in rows),
        failed=failed,
        worst_reference=worst_reference,
        isolated_map=isolated_map,
        end_to_end_map=end_to_end_map,
        depth_chart=depth_chart,
    )


def reasons(report: SuiteReport) -> list[tuple[str, str, Verdict, str]]:
    """Return the reasons why the verdict of the report is not PASS.

    Each reason is a tuple (id of the section on the page, title, verdict, text). If the comparison
    with another implementation of GPT-2 did not pass, the first reason describes it. The list also
    has a reason for each run whose verdict is not PASS.
    """
    found = []
    same = report.same_function
    if same is None:
        why = report.no_reference
        found.append(("same-function", "the same function", report.same_verdict, why))
    elif same.first_failure:
        n_bad = sum(row.verdict is same.verdict for row in same.rows)
        why = f"{n_bad} of {len(same.rows)} activations, first {same.first_failure.key}"
        if same.verdict.is_bad:
            why = f"{ANOTHER_FUNCTION} {why}"
        found.append(("same-function", "the same function", same.verdict, why))
    for index, run in enumerate(report.runs, 1):
        if run.verdict is not Verdict.PASS:
            why = f"{meaning(run)} {_reason(run)}".strip()
            found.append((f"run-{index}", run.title, run.verdict, why))
    return found


def _reason(run: DeviceRun) -> str:
    match run.first_failure:
        case Isolated(name=name):
            return f"First at {name or LOGITS}."
        case EndToEnd(name=name):
            return f"Drifts end to end, first at {name}."
        case Check(measured=None) as check:
            return f"First: {describe(check)}."
        case Check(name=name) as check:
            operation = check in run.probes
            return f"Wrong in single operations, first {name}." if operation else f"Breaks {name}."
        case None:
            return ""
