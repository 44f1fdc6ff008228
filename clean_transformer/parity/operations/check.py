"""Question 3: which operation goes wrong first? Every ATen call beside its float64 replay."""

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
    """What a run under the check saw; it ends at the first WRONG operation.

    `seen` counts every call that has values, `not_checked` those that could not be compared, both
    by the operation's name; `largest` is the largest ratio of each.
    """

    seen: Counter[str] = field(default_factory=Counter)
    not_checked: Counter[str] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=dict)
    finding: Finding | None = None

    @property
    def compared(self) -> Counter[str]:
        """How many calls were compared, by name."""
        return self.seen - self.not_checked

    @property
    def verdict(self) -> Verdict:
        """The finding's; PASS only if there is none and every call was compared."""
        if self.finding is not None:
            return self.finding.verdict
        return Verdict.NOT_CHECKED if self.not_checked or not self.seen else Verdict.PASS


class _FirstWrong(Exception):
    """Ends the run."""


def check_operations(
    function: Callable[..., Any], *inputs: Any, **arguments: Any
) -> OperationsReport:
    """Run the function, without gradients, and compare every ATen operation that it calls."""
    checker = _Checker()
    # Under inference mode a dispatch mode would see whole compositions instead of kernels.
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
    """The first WRONG operation of that run; without one, the first DEGRADED; else `None`.

    `None` says that nothing that could be compared was found wrong: `check_operations` tells what
    was compared.
    """
    return check_operations(function, *inputs, **arguments).finding


class _Checker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Compares each call on its way; whatever mode is below, it too sees every call and retry."""

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
            index = sum(self.report.seen.values()) - 1
            self.report.finding = attempt.diagnose(expected, judgment, index)
        if judgment.verdict is Verdict.WRONG:
            raise _FirstWrong
        return output
