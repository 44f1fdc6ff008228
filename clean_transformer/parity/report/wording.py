"""Builds the sentences of parity reports, and of the errors that `assert_parity` raises."""

from collections.abc import Sequence

from clean_transformer.analysis.comparison import LOGITS
from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import PATHS, Isolated
from clean_transformer.parity.locate import Located
from clean_transformer.parity.results import DeviceRun, UseSummary, verdicts
from clean_transformer.parity.verdict import Check, Verdict, worst
from clean_transformer.reports.environment import lowered_precision


def lower_precision(precision: str) -> str:
    """Return a text which says that errors are as large as those of a lower precision.

    `precision` is the name of this precision, such as "TF32". The text also names the current
    settings that lower the precision. Returns "" if `precision` is "".
    """
    if not precision:
        return ""
    settings = ", ".join(f"{name} = {value}" for name, value in lowered_precision().items())
    return f"; the errors are those of {precision} ({settings or 'no setting asks for it'})"


def group_of(name: str) -> str:
    """Return the group of the activation `name` in the report.

    For an activation inside a block, the group is the block, such as "block 3". For all other
    activations, the group is "outside".
    """
    parts = name.split(".")
    return f"block {parts[1]}" if parts[0] == "blocks" else "outside"


def script_name(run: DeviceRun) -> str:
    """Return the file name of the script that reproduces the first wrong operation of a run."""
    operation = run.located.operation.split(".")[1] if run.located else "nothing"
    return script_file(operation, run.device, run.dtype)


def script_file(operation: str, device: str, dtype: str) -> str:
    """Return the file name of a script that reproduces an error of `operation`, such as "mm"."""
    return f"reproduce-{operation}-{device.replace(':', '')}-{dtype}.py"


def located_lines(located: Located) -> list[str]:
    """Return lines about the first wrong operation, its operands, and matching known issues."""
    return [
        f"   {located.operation}, in {located.where}: error {located.ratio:.3g} roundings, "
        f"{located.bits:.1f} correct bits; {located.diagnosis}",
        *(f"     {operand}" for operand in located.operands),
        *(f"   matches the known issue {known}" for known in located.known),
    ]


def describe(row: Isolated | EndToEnd | Check) -> str:
    """Return one sentence, without a period, about a result that is not PASS."""
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
    """Return one line about a use of the model, such as "generate: generating text".

    If the use is wrong from some position on, the line also names this position. If the use could
    not be checked, the line says why.
    """
    where = f", wrong from position {use.wrong_from} on" if use.wrong_from else ""
    why = f"; {use.reason}" if use.reason else ""
    return f"{use.name}: {use.means}{where}{why}"


# `uses_by_verdict` writes one sentence for each verdict, in this order. The sentence begins with
# these words.
INTRODUCED = {
    Verdict.WRONG: "Wrong",
    Verdict.DEGRADED: "Less accurate than it should be",
    Verdict.ERROR: "Failed with an exception",
    Verdict.NOT_CHECKED: "Not checked",
    Verdict.PASS: "Right",
}
# What it means for a person if our model and the reference are not the same function.
ANOTHER_FUNCTION = (
    "This code does not compute GPT-2: on every device, its results differ from the reference's."
)
# The sentence that `meaning` adds if `only_drifts(run)` is True.
DRIFT_ONLY = (
    "Each activation alone is accurate, but the whole run is not: small errors add up, and exceed "
    "the errors that random rounding causes."
)
# These uses check every position of a text, so `_in_use` can tell which lengths are right. The
# other uses check only some positions.
BY_LENGTH = ("forward", "long text")


def meaning(run: DeviceRun) -> str:
    """Return a text that says which uses of the model are wrong on the device, and which are right.

    A use is, for example, generating text. If no use is wrong, the text names the wrong single
    operations, such as softmax. Returns "" if everything passed.
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
    """Return a sentence for each verdict, such as "Right: generating text, beam search.".

    Each sentence lists the uses of the model that have this verdict. The sentence for the verdict
    WRONG also lists the texts in `also_wrong`.
    """
    groups = {
        words: [_in_use(use) for use in uses if use.verdict is verdict]
        for verdict, words in INTRODUCED.items()
    }
    groups[INTRODUCED[Verdict.WRONG]].extend(also_wrong)
    return " ".join(f"{words}: {', '.join(same)}." for words, same in groups.items() if same)


def _in_use(use: UseSummary) -> str:
    """Return `use.means`, followed by the position or text length from which the use is wrong."""
    if not use.wrong_from:
        return use.means
    if use.name in BY_LENGTH:
        return (
            f"{use.means} (texts longer than {use.wrong_from} tokens are wrong, shorter ones are "
            "right)"
        )
    return f"{use.means} (of the positions checked, those from {use.wrong_from} on are wrong)"


def _single_operations(run: DeviceRun) -> list[str]:
    """Return a list with one text that names all wrong single operations, or an empty list."""
    bad = dict.fromkeys(probe.name.split(",")[0] for probe in run.probes if probe.verdict.is_bad)
    if not bad:
        return []
    return [f"single operations in other sizes or layouts than GPT-2's ({', '.join(bad)})"]


def only_drifts(run: DeviceRun) -> bool:
    """Whether the only fault is drift: too large a total error, from the first layer on."""
    drifts = worst(verdicts(run.end_to_end)).is_bad
    return drifts and not worst(verdicts(run.isolated, run.uses, run.invariants, run.probes)).is_bad


def worst_head(row: Isolated) -> str:
    """Return the index of the head with the largest error ratio as text, or "" without heads."""
    return str(row.per_head.index(row.ratio)) if row.ratio in row.per_head else ""
