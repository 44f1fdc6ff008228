"""Question 3: which operation goes wrong first? Compares every ATen call with a float64 replay."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clean_transformer.parity.operations.bounds import WITHOUT_VALUES
from clean_transformer.parity.operations.diagnosis import Attempt, Finding
from clean_transformer.parity.operations.judgment import judge
from clean_transformer.parity.operations.replay import operation_name
from clean_transformer.parity.verdict import Verdict


@dataclass
class OperationsReport:
    """What a run under the check found. The run ends at the first WRONG operation.

    All three tables are by operation name. `seen` counts the calls that return values,
    `not_checked` the calls that could not be compared, and `largest` has the largest ratio.
    `finding` is the first WRONG call or, without one, the first DEGRADED call.
    """

    seen: Counter[str] = field(default_factory=Counter)
    not_checked: Counter[str] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=dict)
    finding: Finding | None = None

    @property
    def compared(self) -> Counter[str]:
        """The number of compared calls by operation name."""
        return self.seen - self.not_checked

    @property
    def verdict(self) -> Verdict:
        """The finding's verdict; without one, PASS if all calls were compared, else NOT CHECKED."""
        if self.finding is not None:
            return self.finding.verdict
        return Verdict.NOT_CHECKED if self.not_checked or not self.seen else Verdict.PASS


class _FirstWrong(Exception):
    """Ends the run at the first WRONG operation."""


def check_operations(
    function: Callable[..., Any], *inputs: Any, **arguments: Any
) -> OperationsReport:
    """Run `function(*inputs, **arguments)` without gradients and judge every ATen call in it."""
    checker = _Checker()
    # In inference mode, a dispatch mode would see composite operations instead of kernels.
    with torch.inference_mode(False), torch.no_grad():
        try:
            with checker:
                function(*inputs, **arguments)
        except _FirstWrong:
            pass
    return checker.report


def first_wrong_operation(
    function: Callable[..., Any], *inputs: Any, **arguments: Any
) -> Finding | None:
    """The `finding` of `check_operations`: the first WRONG call, else the first DEGRADED one.

    None means that all calls that could be compared are right.
    """
    return check_operations(function, *inputs, **arguments).finding


class _Checker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Judges every call. A dispatch mode below this one, such as a planted fault, sees them too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.report = OperationsReport()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (args, kwargs or {})
        name = operation_name(func)
        if name in WITHOUT_VALUES:
            return func(*args, **given[1])
        attempt = Attempt(func, *given)
        output = func(*args, **given[1])
        self.report.seen[name] += 1
        expected = attempt.expect(output)
        if expected is None:
            self.report.not_checked[name] += 1
            return output
        judgment = judge(expected, output)
        self.report.largest[name] = max(self.report.largest.get(name, 0.0), judgment.ratio)
        if judgment.verdict is Verdict.WRONG or (
            judgment.verdict is Verdict.DEGRADED and self.report.finding is None
        ):
            self.report.finding = attempt.diagnose(expected, judgment)
        if judgment.verdict is Verdict.WRONG:
            raise _FirstWrong
        return output
