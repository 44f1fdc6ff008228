"""The results of the parity suite as dataclasses, with their verdicts and first failures."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from clean_transformer.analysis.comparison import Impact
from clean_transformer.config import Config
from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.locate import Located
from clean_transformer.parity.same_function import ParityReport
from clean_transformer.parity.uses.judge import UseResult
from clean_transformer.parity.verdict import Check, Verdict, worst

Key = TypeVar("Key")
Row = TypeVar("Row")
Failure = TypeVar("Failure", bound=Isolated | EndToEnd | Check)


# The paths (see `PATHS` in `activations/isolated.py`) whose kernels run only if somebody watches
# inner activations. The `isolated` rows of these paths give the use "hooks" its verdict.
WATCHED = ("explicit", "per head")


@dataclass(frozen=True)
class UseSummary:
    """The report's line on all uses (see `Use`) with the same name, with their worst verdict.

    `means` says what a person does in this use, such as "generating text". `wrong_from` is copied
    from the `UseResult`: the first position with too large an error, or None. `reason` says why the
    verdict is ERROR or NOT CHECKED; it is empty for other verdicts.
    """

    name: str
    means: str
    verdict: Verdict
    wrong_from: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class DeviceRun:
    """The answers to questions 2 and 3 for one device, dtype and mode.

    `settings` holds the device's precision settings. `uses` has the result of each use. `isolated`
    has the error that the device introduces in each activation. `end_to_end` has the drift of each
    activation. `invariants` holds the checks of `invariants.py`, and `probes` those of single
    operations. `errors` describes the other measurements that raised an exception. (If a use, an
    invariant or a single operation raises an exception, its own row describes it.) `impact` says
    how much the device's errors change the predictions. `located` is the first wrong operation, if
    one was found. If nothing ran, `not_checked` is the reason.
    """

    device: str
    dtype: str
    mode: str = "eager"
    settings: dict[str, str] = field(default_factory=dict)
    uses: list[UseResult] = field(default_factory=list)
    isolated: list[Isolated] = field(default_factory=list)
    end_to_end: list[EndToEnd] = field(default_factory=list)
    invariants: list[Check] = field(default_factory=list)
    probes: list[Check] = field(default_factory=list)
    errors: list[Check] = field(default_factory=list)
    impact: Impact | None = None
    located: Located | None = None
    not_checked: str = ""

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all rows and checks."""
        return worst(verdicts(self.isolated, self.uses, self._rest))

    @property
    def first_failure(self) -> Isolated | EndToEnd | Check | None:
        """The first row or check that found a fault; without a fault, the first that did not pass.

        A row found a fault if it is WRONG or DEGRADED. Without such a row, the result is the first
        row with the worst verdict, ERROR or NOT CHECKED. None if everything passed.

        The order is: isolated errors, uses, drift, invariants, single operations, measurements that
        raised an exception. Isolated errors come first because they say where an error begins.
        Drift does not: an activation also drifts because of errors in earlier activations. The rows
        of isolated errors, of each use and of drift follow the forward pass.
        """
        in_order = (row for rows in by_activation(self.isolated).values() for row in rows)
        in_uses = (row for use in self.uses for row in use.rows)
        return first_failure([*in_order, *in_uses, *self._rest])

    @property
    def by_use(self) -> list[UseSummary]:
        """One summary for each name of a use.

        Several uses can have the same name, with other texts. Then the summary is that of the use
        with the worst verdict. The summary "hooks" has the worst verdict of the `isolated` rows
        with a path in WATCHED. The verdict of "forward" includes all other `isolated` rows, the
        drift and the invariants. `errors` are counted like the `isolated` rows.
        """
        found: dict[str, list[UseSummary]] = {}
        for result in self.uses:
            use = result.use
            said = UseSummary(use.name, use.means, result.verdict, result.wrong_from)
            found.setdefault(use.name, []).append(replace(said, reason=reason(result.rows)))
        watched: list[Isolated | Check] = [row for row in self.isolated if row.path in WATCHED]
        watched += [error for error in self.errors if error.name.endswith(WATCHED)]
        if watched:
            hooks = UseSummary(
                "hooks", "watching and patching activations", worst(verdicts(watched))
            )
            found["hooks"] = [replace(hooks, reason=reason(watched))]
        if "forward" in found:
            others: list[Isolated | EndToEnd | Check] = [
                *(row for row in self.isolated if row.path not in WATCHED),
                *self.end_to_end,
                *self.invariants,
                *(error for error in self.errors if not error.name.endswith(WATCHED)),
            ]
            rest = replace(found["forward"][0], verdict=worst(verdicts(others)))
            found["forward"].append(replace(rest, reason=reason(others)))
        return [max(same, key=lambda each: each.verdict.severity) for same in found.values()]

    @property
    def _rest(self) -> list[EndToEnd | Check]:
        return [*self.end_to_end, *self.invariants, *self.probes, *self.errors]


@dataclass(frozen=True)
class SuiteReport:
    """The result of `clean-transformer parity`.

    `weights` says where the weights come from. `tokens` is the shape (batch, pos) of the tokens.
    `environment` describes the software and the processor. `same_function` answers question 1. If
    `same_function` is None, `no_reference` is the reason, and `without_reference` the verdict on
    question 1: NOT CHECKED, or ERROR after an exception. `runs` answers questions 2 and 3.
    """

    weights: str
    cfg: Config
    tokens: tuple[int, int]
    environment: dict[str, str]
    same_function: ParityReport | None
    no_reference: str
    runs: list[DeviceRun]
    without_reference: Verdict = Verdict.NOT_CHECKED

    @property
    def same_verdict(self) -> Verdict:
        """The verdict on question 1."""
        return self.same_function.verdict if self.same_function else self.without_reference

    @property
    def verdict(self) -> Verdict:
        """PASS only if the function is the same and every device computes it accurately."""
        return worst([self.same_verdict, *(run.verdict for run in self.runs)])


def reason(rows: Sequence[Isolated | EndToEnd | Check]) -> str:
    """Why the worst verdict of the rows is ERROR or NOT CHECKED; "" for another verdict."""
    first = first_failure(rows)
    return first.note if isinstance(first, Check) and not first.verdict.is_bad else ""


def verdicts(*groups: Iterable[Isolated | EndToEnd | Check | UseResult]) -> Iterator[Verdict]:
    """The verdict of every row of every group."""
    return (row.verdict for rows in groups for row in rows)


def first_failure(rows: Sequence[Failure]) -> Failure | None:
    """The first row that is WRONG or DEGRADED.

    Without such a row: the first row with the worst verdict, or None if all rows pass.
    """
    bad = next((row for row in rows if row.verdict.is_bad), None)
    failures = [row for row in rows if row.verdict is not Verdict.PASS]
    return bad or max(failures, key=lambda row: row.verdict.severity, default=None)


def first_bad_activation(rows: list[Isolated]) -> Isolated | None:
    """The first row that does not pass, in the order of the forward pass.

    Activations are ordered by `by_activation`. None if all rows pass.
    """
    in_order = (row for same in by_activation(rows).values() for row in same)
    return next((row for row in in_order if row.verdict is not Verdict.PASS), None)


def by_activation(rows: list[Isolated]) -> dict[str, list[Isolated]]:
    """Map each activation's name to its rows. The names are in the order of the forward pass.

    The rows of one `case` and one `path` come from one run, in the order of the forward pass, but
    no run watches every activation. The run with the most rows decides the order of the names.
    Names that are missing in that run follow at the end.
    """
    watched = grouped(rows, lambda row: (row.case, row.path)).values()
    names = (row.name for same in sorted(watched, key=len, reverse=True) for row in same)
    same_name = grouped(rows, lambda row: row.name)
    return {name: same_name[name] for name in names}


def grouped(rows: Iterable[Row], key: Callable[[Row], Key]) -> dict[Key, list[Row]]:
    """Group the rows by `key(row)`. The keys are in the order in which they first occur."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
