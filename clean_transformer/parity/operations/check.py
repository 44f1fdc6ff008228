"""Question 3: which operation goes wrong first?

Compares the result of every ATen call with a float64 replay of this call on the CPU.
"""

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
    """The result of `check_operations`, whose run ends at the first WRONG operation.

    The keys of the first three fields are operation names. `seen` counts all calls that return
    values. `not_checked` counts the calls that could not be compared. `largest` holds the largest
    error ratio of each operation. `finding` is the first WRONG call; if no call is WRONG, it is the
    first DEGRADED call.
    """

    seen: Counter[str] = field(default_factory=Counter)
    not_checked: Counter[str] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=dict)
    finding: Finding | None = None

    @property
    def compared(self) -> Counter[str]:
        """The number of compared calls, by operation name."""
        return self.seen - self.not_checked

    @property
    def verdict(self) -> Verdict:
        """The verdict of the finding, if there is one.

        Without a finding: PASS if all calls were compared, otherwise NOT CHECKED.
        """
        if self.finding is not None:
            return self.finding.verdict
        return Verdict.NOT_CHECKED if self.not_checked or not self.seen else Verdict.PASS


class _FirstWrong(Exception):
    """Raised to end the run at the first WRONG operation."""


def check_operations(
    function: Callable[..., Any], *inputs: Any, **arguments: Any
) -> OperationsReport:
    """Run `function(*inputs, **arguments)` without gradients and check each ATen call it makes."""
    checker = _Checker()
    # In inference mode, PyTorch does not split composite operations. The check would see `linear`
    # instead of the kernels that `linear` calls.
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
    """Return the first WRONG call; if no call is WRONG, the first DEGRADED call.

    Runs `check_operations`. None means that all calls that could be compared are right.
    """
    return check_operations(function, *inputs, **arguments).finding


class _Checker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Checks every call of an operation.

    Dispatch modes that were entered earlier, such as planted faults, still see every call.
    """

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
