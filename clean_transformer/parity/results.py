"""The classes that hold the results of the parity suite."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from clean_transformer.analysis.comparison import LOGITS, Impact
from clean_transformer.config import Config
from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.locate import Located
from clean_transformer.parity.same_function import ParityReport
from clean_transformer.parity.uses.judge import UseResult
from clean_transformer.parity.verdict import Check, Verdict, worst
from clean_transformer.reports.page import render_page

Key = TypeVar("Key")
Row = TypeVar("Row")
Failure = TypeVar("Failure", bound=Isolated | EndToEnd | Check)


# The paths (see `PATHS` in `activations/isolated.py`) that watch inner activations, so that the
# model runs other kernels. The `isolated` rows with these paths decide the verdict of "hooks".
WATCHED = ("explicit", "per head")


@dataclass(frozen=True)
class UseSummary:
    """One line of the report: the verdict on one way to call the model, such as "generate".

    `name` is the short name of this way, and `means` says what a person then does, such as
    "generating text". `wrong_from` is the first position with too large an error, or None (see
    `UseResult`). `reason` says why the verdict is ERROR or NOT CHECKED, or how the outputs
    with a cache differ. It is empty otherwise.
    """

    name: str
    means: str
    verdict: Verdict
    wrong_from: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class DeviceRun:
    """The results of `check_device` for one device, dtype and mode.

    `settings` holds the device's precision settings. `uses` has a result for each way to call the
    model, such as generating text. `isolated` has the error that the device introduces in each
    activation. `end_to_end` has the drift: the error that each activation has accumulated since the
    first layer. `invariants` holds the checks of `invariants.py`, and `probes` holds the checks of
    single operations. If one of these checks raises an exception, its result describes the
    exception. `errors` describes all other measurements that raised an exception.

    `impact` says how much the device's errors change the predictions. `located` is the first wrong
    operation, or None if no wrong operation was found. If nothing ran, `not_checked` is the reason.
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
        """The worst verdict of all results."""
        return worst(verdicts(self.isolated, self.uses, self._rest))

    @property
    def first_failure(self) -> Isolated | EndToEnd | Check | None:
        """The first result with the verdict WRONG or DEGRADED.

        If there is none, this is the first result with the worst verdict, ERROR or NOT CHECKED. If
        everything passed, it is None.

        The order is: `isolated`, `uses`, `end_to_end`, `invariants`, `probes`, `errors`. The
        isolated errors come first because they show where an error begins. The drift in
        `end_to_end` does not show this, because it also contains the errors of earlier activations.
        Within `isolated`, `end_to_end` and each of the `uses`, the results are in the order of the
        forward pass.
        """
        in_order = (row for rows in by_activation(self.isolated).values() for row in rows)
        in_uses = (row for use in self.uses for row in use.rows)
        return first_failure([*in_order, *in_uses, *self._rest])

    @property
    def by_use(self) -> list[UseSummary]:
        """One summary for each way to call the model, such as "generate".

        If `uses` has several results with the same name, for different tokens, the summary
        describes the worst of them. The summary "hooks" is for runs in which hooks watch inner
        activations. It has the worst verdict of the `isolated` results whose `path` is in WATCHED,
        and of the checks in `errors` whose name ends with a path in WATCHED. The summary "forward"
        includes all other results in `isolated` and `errors`, and those in `end_to_end` and
        `invariants`.
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
    def title(self) -> str:
        """The device, dtype and mode, such as "cpu float32". The mode "eager" is left out."""
        return f"{self.device} {self.dtype}{'' if self.mode == 'eager' else f', {self.mode}'}"

    @property
    def _said(self) -> str:
        if self.not_checked:
            return self.not_checked
        n_checks = len([*verdicts(self.isolated, self.uses, self._rest)])
        failure = self.first_failure
        where = f"; the first failure is at {failure.name or LOGITS}" if failure else ""
        operation = f", in {self.located.operation}" if self.located else ""
        return f"{n_checks} checks{where}{operation}"

    def __repr__(self) -> str:
        return f"DeviceRun({self.title}: {self.verdict.value}; {self._said})"

    def _repr_html_(self) -> str:
        return render_page(
            "verdict.html.jinja",
            title=self.title,
            verdict=self.verdict,
            said=self._said,
            rows=[(f"{use.name}: {use.means}", use.verdict) for use in self.by_use],
        )

    @property
    def _rest(self) -> list[EndToEnd | Check]:
        return [*self.end_to_end, *self.invariants, *self.probes, *self.errors]


@dataclass(frozen=True)
class SuiteReport:
    """The result of `clean-transformer parity`.

    `weights` says where the weights come from. `tokens` is the shape (batch, pos) of the tokens.
    `environment` describes the software and the processor. `same_function` says whether the model
    is the same function as the reference, another implementation of GPT-2. If this was not checked,
    `same_function` is None, `no_reference` is the reason, and `without_reference` is the verdict:
    NOT CHECKED, or ERROR after an exception. `runs` has the results for each device, dtype and
    mode.
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
        """The verdict on the question whether the model is the same function as the reference."""
        return self.same_function.verdict if self.same_function else self.without_reference

    @property
    def verdict(self) -> Verdict:
        """The worst of `same_verdict` and the verdicts of all `runs`."""
        return worst(verdict for _, verdict in self._parts)

    @property
    def _parts(self) -> list[tuple[str, Verdict]]:
        same = self.same_function
        beside = same.reference if same else self.no_reference or "no reference"
        first = (f"the same function: {beside}", self.same_verdict)
        return [first, *((run.title, run.verdict) for run in self.runs)]

    def __repr__(self) -> str:
        parts = "; ".join(f"{what}: {verdict.value}" for what, verdict in self._parts)
        return f"SuiteReport({self.verdict.value}; {parts})"

    def _repr_html_(self) -> str:
        return render_page(
            "verdict.html.jinja",
            title="Parity",
            verdict=self.verdict,
            said=f"GPT-2 with {self.weights}, {self.tokens[0]} × {self.tokens[1]} tokens",
            rows=self._parts,
        )


def reason(rows: Sequence[Isolated | EndToEnd | Check]) -> str:
    """Say why the worst verdict of the results is ERROR or NOT CHECKED.

    Return "" if a verdict is WRONG or DEGRADED, or if all results pass.
    """
    first = first_failure(rows)
    return first.note if isinstance(first, Check) and not first.verdict.is_bad else ""


def verdicts(*groups: Iterable[Isolated | EndToEnd | Check | UseResult]) -> Iterator[Verdict]:
    """Return the verdict of every result in every group."""
    return (row.verdict for rows in groups for row in rows)


def first_failure(rows: Sequence[Failure]) -> Failure | None:
    """Return the first result with the verdict WRONG or DEGRADED.

    If there is none, return the first result with the worst verdict. If all results pass, return
    None.
    """
    bad = next((row for row in rows if row.verdict.is_bad), None)
    failures = [row for row in rows if row.verdict is not Verdict.PASS]
    return bad or max(failures, key=lambda row: row.verdict.severity, default=None)


def first_bad_activation(rows: list[Isolated]) -> Isolated | None:
    """Return the first result that does not pass, in the order of the forward pass, or None."""
    in_order = (row for same in by_activation(rows).values() for row in same)
    return next((row for row in in_order if row.verdict is not Verdict.PASS), None)


def by_activation(rows: list[Isolated]) -> dict[str, list[Isolated]]:
    """Group the results by the activation's name, in the order of the forward pass."""
    # The results with the same `case` and `path` come from one run, and are in the order of the
    # forward pass. But no run watches every activation. So the run with the most results decides
    # the order of the names, and names that are missing in this run follow at the end.
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
