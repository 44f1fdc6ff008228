"""Sentences for the report in the terminal, the report on the HTML page, and `assert_parity`."""

from collections.abc import Sequence

from clean_transformer.analysis.comparison import LOGITS
from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import PATHS, Isolated
from clean_transformer.parity.locate import Located
from clean_transformer.parity.results import DeviceRun, UseSummary, verdicts
from clean_transformer.parity.verdict import Check, Verdict, worst
from clean_transformer.reports.environment import lowered_precision


def lower_precision(precision: str) -> str:
    """Say that errors are those of a lower precision, and which settings lower the precision.

    `precision` is `Isolated.lower_precision`. If it is empty, the result is empty.
    """
    if not precision:
        return ""
    settings = ", ".join(f"{name} = {value}" for name, value in lowered_precision().items())
    return f"; the errors are those of {precision} ({settings or 'no setting asks for it'})"


def group_of(name: str) -> str:
    """The group of the activation `name` in the report.

    For an activation inside a block, the group is the block, such as "block 3". For all other
    activations, the group is "outside".
    """
    parts = name.split(".")
    return f"block {parts[1]}" if parts[0] == "blocks" else "outside"


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
            f"{row.name} (end to end): error {row.rho:.3g} times that of random rounding, "
            f"healthy up to {row.healthy:g}"
        )
    if isinstance(row, Check) and row.measured is None:
        return f"{row.name}: {row.note}"
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
        f"{head and f', head {head}'}{lower_precision(row.lower_precision)}"
    )


def use_line(use: UseSummary) -> str:
    """Return one line about a use of the model: its name and what a person does in it.

    If `use.wrong_from` is set, the line also says from which position on the use is wrong. If the
    use could not be checked, the line says why.
    """
    where = f", wrong from position {use.wrong_from} on" if use.wrong_from else ""
    why = f"; {use.reason}" if use.reason else ""
    return f"{use.name}: {use.means}{where}{why}"


# The word with which `meaning` introduces the uses of each verdict, in the order of the sentences.
INTRODUCED = {
    Verdict.WRONG: "Wrong",
    Verdict.DEGRADED: "Less accurate than it should be",
    Verdict.ERROR: "Failed with an exception",
    Verdict.NOT_CHECKED: "Not checked",
    Verdict.PASS: "Right",
}
# What a WRONG answer to question 1 means for a person.
ANOTHER_FUNCTION = (
    "This code does not compute GPT-2: on every device, its results differ from the reference's."
)
# What `meaning` adds if `only_drifts`.
DRIFT_ONLY = (
    "Each activation alone is accurate, but the whole run is not: small errors add up, and exceed "
    "the errors that random rounding causes."
)
# The uses in which a person knows the length of the text. In other uses, padding counts too.
BY_LENGTH = ("forward", "long text", "generate")


def meaning(run: DeviceRun) -> str:
    """Say what the verdict of a run means for a person: which uses are wrong, and which are right.

    If no use is wrong, the text names the wrong single operations. Returns "" if everything passed.
    """
    if run.not_checked:
        return f"Nothing was checked: {run.not_checked}."
    if run.verdict is Verdict.PASS:
        return ""
    measured = verdicts(run.isolated, run.uses, run.end_to_end, run.invariants)
    also_wrong = [] if worst(measured).is_bad else _single_operations(run)
    said = uses_by_verdict(run.by_use, also_wrong)
    return f"{said} {DRIFT_ONLY}" if only_drifts(run) else said


def uses_by_verdict(uses: list[UseSummary], also_wrong: Sequence[str] = ()) -> str:
    """Return a sentence for each verdict, which says what a person does in the uses with it.

    The texts `also_wrong` are added to the sentence for WRONG.
    """
    groups = {
        words: [_in_use(use) for use in uses if use.verdict is verdict]
        for verdict, words in INTRODUCED.items()
    }
    groups[INTRODUCED[Verdict.WRONG]].extend(also_wrong)
    return " ".join(f"{words}: {', '.join(same)}." for words, same in groups.items() if same)


def _in_use(use: UseSummary) -> str:
    """What a person does in a use, and from which text length or position on it is wrong."""
    if not use.wrong_from:
        return use.means
    if use.name in BY_LENGTH:
        return (
            f"{use.means} (texts longer than {use.wrong_from} tokens are wrong, shorter ones are "
            "right)"
        )
    return f"{use.means} (from position {use.wrong_from} on)"


def _single_operations(run: DeviceRun) -> list[str]:
    """The wrong single operations of a run, in words, as a list with at most one text."""
    bad = dict.fromkeys(probe.name.split(",")[0] for probe in run.probes if probe.verdict.is_bad)
    if not bad:
        return []
    return [f"single operations in other sizes or layouts than GPT-2's ({', '.join(bad)})"]


def only_drifts(run: DeviceRun) -> bool:
    """Whether the drift is the only measurement of the run that found a fault."""
    drifts = worst(verdicts(run.end_to_end)).is_bad
    return drifts and not worst(verdicts(run.isolated, run.uses, run.invariants, run.probes)).is_bad


def worst_head(row: Isolated) -> str:
    """The index of the head with the largest ratio, as text; "" if the row has no heads."""
    return str(row.per_head.index(row.ratio)) if row.ratio in row.per_head else ""
