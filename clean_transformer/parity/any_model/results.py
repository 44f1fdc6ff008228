"""The classes that hold the result of `check_model`."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from clean_transformer.parity.locate import Located, in_words
from clean_transformer.parity.operations.check import CheckedCall
from clean_transformer.parity.oracle import ACCUMULATOR, UNIT_ROUNDOFF
from clean_transformer.parity.results import UseSummary, grouped
from clean_transformer.parity.verdict import Check, Verdict, worst
from clean_transformer.reports.plain import Schema

SCHEMA = Schema("clean-transformer/check", version=1)

# For each use of a model, what a person does in this use.
MEANINGS = {
    "forward": "running the model",
    "generate": "generating text",
    "backward": "computing gradients",
}


@dataclass
class Row:
    """One row of the report: an operation, in one dtype, in one module or a group of modules.

    `calls` is the number of calls, and `not_checked` is the number of calls that could not be
    judged. `ratio` is the largest error of a call, in units of one rounding. `bits` is the lowest
    effective precision of a call. `dtype` is the dtype of the first floating-point output of a
    call, or "" if no output is floating-point.
    """

    module: str
    operation: str
    dtype: str
    calls: int = 0
    not_checked: int = 0
    ratio: float = 0.0
    bits: float = math.inf
    verdict: Verdict = Verdict.PASS

    def add(self, other: "Row") -> None:
        """Add the calls of `other` to this row."""
        self.calls += other.calls
        self.not_checked += other.not_checked
        self.ratio = max(self.ratio, other.ratio)
        self.bits = min(self.bits, other.bits)
        self.verdict = worst([self.verdict, other.verdict])


@dataclass
class UseReport:
    """The result of one use of the model: "forward", "generate" or "backward".

    `rows` has a row for each combination of module, operation and dtype. `located` describes the
    first call with the verdict WRONG, or, if there is none, the first with DEGRADED. If an
    exception stopped the use, or if the use could not start, `failed` says why. `cached` is the
    result of `compare_cached`; only the use "generate" has it.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    located: Located | None = None
    failed: Check | None = None
    cached: Check | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of `rows`, `failed` and `cached`; NOT CHECKED if all are empty."""
        checks = [each.verdict for each in (self.failed, self.cached) if each]
        return worst([*(row.verdict for row in self.rows), *checks])

    @property
    def reason(self) -> str:
        """Why the use failed, or how the outputs with a cache differ; "" for other verdicts."""
        checks = (each for each in (self.failed, self.cached) if each)
        return next((each.note for each in checks if each.verdict is not Verdict.PASS), "")

    @property
    def roundoff(self) -> float:
        """The unit roundoff of the least accurate dtype in `rows`."""
        dtypes = {getattr(torch, row.dtype) for row in self.rows if row.dtype}
        return max((UNIT_ROUNDOFF[each] for each in dtypes & {*UNIT_ROUNDOFF}), default=ACCUMULATOR)


@dataclass
class ModelReport:
    """The result of `check_model`.

    `model` is the name of the model's class, and `inputs` describes its inputs. `dtypes` has the
    floating-point dtypes of the parameters, buffers and inputs. `uses` has one result for each
    way to call the model: "forward", "backward" and "generate". If the model cannot run one of
    them, `absent` maps its name to the reason. `environment` describes the software and the
    processor.
    """

    model: str
    inputs: str
    device: str
    dtypes: list[str]
    environment: dict[str, str]
    uses: list[UseReport] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all `uses`."""
        return worst(use.verdict for use in self.uses)

    @property
    def by_use(self) -> list[UseSummary]:
        """The name, the meaning and the verdict of each use, and the reason of the verdict."""
        return [
            UseSummary(use.name, MEANINGS[use.name], use.verdict, reason=use.reason)
            for use in self.uses
        ]

    @property
    def rows(self) -> list[Row]:
        """The rows of all `uses`."""
        return [row for use in self.uses for row in use.rows]

    @property
    def of_calls(self) -> Verdict:
        """The worst verdict of all calls of operations."""
        return worst(row.verdict for row in self.rows)

    @property
    def first_wrong(self) -> Located | None:
        """The first call with the verdict WRONG, or the first with DEGRADED if no call is WRONG."""
        found = [use for use in self.uses if use.located]
        chosen = max(found, key=lambda use: use.verdict.severity, default=None)
        return chosen.located if chosen else None


class Recorder:
    """Adds the calls of a run of the model to `report`, without keeping the calls in memory.

    `path()` returns the path of the submodule that makes the current call.
    """

    def __init__(self, report: UseReport, path: Callable[[], str]):
        self.report = report
        self.path = path
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.found = Verdict.PASS

    def __call__(self, call: CheckedCall) -> None:
        """Add a call of the submodule that is running to the report."""
        self.add(self.path(), call)

    def add(self, module: str, call: CheckedCall) -> None:
        """Add one call of the submodule with the path `module` to its row in the report.

        If its verdict is DEGRADED or WRONG, and worse than all verdicts before, `report.located`
        describes this call.
        """
        judgment = call.judgment
        dtype = "" if call.dtype is None else str(call.dtype).removeprefix("torch.")
        one = Row(module, call.name, dtype, calls=1)
        if judgment is None:
            one.not_checked, one.verdict = 1, Verdict.NOT_CHECKED
        else:
            one.ratio, one.bits, one.verdict = judgment.ratio, judgment.bits, judgment.verdict
            one.not_checked = int(judgment.verdict is Verdict.NOT_CHECKED)
        key = (module, call.name, dtype)
        if key not in self.rows:
            self.rows[key] = Row(*key)
            self.report.rows.append(self.rows[key])
        self.rows[key].add(one)
        # A WRONG call replaces a DEGRADED call in `located`.
        if one.verdict.severity > max(self.found.severity, Verdict.NOT_CHECKED.severity):
            self.found = one.verdict
            self.report.located = in_words(call.diagnose(), f"{module} ({self.report.name})")


def summed(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, tuple[Row, Row]]:
    """Group the rows by `key(row)`. Map each key to a pair (sum of its rows, its worst row).

    The worst row has the worst verdict, and of these rows, the largest error ratio. The group with
    the worst such row comes first.
    """

    def badness(row: Row) -> tuple[int, float]:
        return row.verdict.severity, row.ratio

    sums = {}
    for name, same in grouped(rows, key).items():
        total = Row("", "", "")
        for row in same:
            total.add(row)
        sums[name] = (total, max(same, key=badness))
    return dict(sorted(sums.items(), key=lambda item: badness(item[1][0]), reverse=True))


def alike(path: str) -> str:
    """Return the path with "*" in place of numbers: "h.*.mlp" for "h.3.mlp"."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path)


def floating_dtypes(tensors: Iterable[torch.Tensor]) -> list[str]:
    """Return the sorted names of the floating-point dtypes of the tensors."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
