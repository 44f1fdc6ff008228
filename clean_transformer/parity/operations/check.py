"""Finds the first ATen operation that a device computes wrongly.

`check_operations` runs a function on the device. It repeats every ATen call of the function in
float64 on the CPU, and compares the result of the device with the float64 result.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from clean_transformer.parity.operations.bounds import RULES, WITHOUT_VALUES
from clean_transformer.parity.operations.compiled import CompiledCall, watched
from clean_transformer.parity.operations.diagnosis import Attempt, Finding, first_float
from clean_transformer.parity.operations.judgment import Judgment
from clean_transformer.parity.operations.replay import Expected, computed, operation_name
from clean_transformer.parity.oracle import uncompiled_flex_attention
from clean_transformer.parity.verdict import Verdict
from clean_transformer.reports.page import render_page


@dataclass
class OperationsReport:
    """The result of `check_operations`: how many calls were compared, and the first bad call.

    The keys of `seen`, `not_checked` and `largest` are operation names, such as "mm". `seen` counts
    the calls of each operation. It leaves out operations without a fixed result, such as `empty`.
    `not_checked` counts the calls without an exact result to compare with, such as calls of
    `bernoulli_`, and the calls whose error is too large for limits that are only estimates (see
    `Expected.proves`). `largest` holds the largest error of each operation, in units of one
    rounding error (see `Judgment.ratio`).

    `finding` describes the first call with the verdict WRONG, at which the check stops. If there is
    no such call, `finding` describes the first call with the verdict DEGRADED. If all compared
    calls pass, `finding` is None.
    """

    seen: Counter[str] = field(default_factory=Counter)
    not_checked: Counter[str] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=dict)
    finding: Finding | None = None

    @property
    def compared(self) -> Counter[str]:
        """For each operation, the number of its calls that were compared."""
        return self.seen - self.not_checked

    @property
    def verdict(self) -> Verdict:
        """The verdict on the first bad call (see `finding`), or else PASS or NOT CHECKED.

        Without a bad call, the verdict is PASS if all calls were compared. It is NOT CHECKED if
        there were no calls, or if a call could not be compared.
        """
        if self.finding is not None:
            return self.finding.verdict
        return Verdict.NOT_CHECKED if self.not_checked or not self.seen else Verdict.PASS

    @property
    def _said(self) -> str:
        counts = f"{self.compared.total()} of {self.seen.total()} calls compared"
        if self.finding is None:
            return counts
        return f"{counts}; {self.finding.call.name}: {self.finding.diagnosis}"

    def __repr__(self) -> str:
        return f"OperationsReport({self.verdict.value}; {self._said})"

    def _repr_html_(self) -> str:
        return render_page(
            "verdict.html.jinja",
            title="ATen calls",
            verdict=self.verdict,
            said=self._said,
            rows=[],
        )


class _FirstWrong(Exception):
    """Raised at the first call with the verdict WRONG, to stop the function that is checked."""


def check_operations(
    function: Callable[..., Any], *inputs: Any, **arguments: Any
) -> OperationsReport:
    """Run `function(*inputs, **arguments)`, and check every ATen call in it.

    Each call is repeated in float64 on the CPU, and both results are compared. A call of compiled
    code, such as a module after `torch.compile`, counts as one call (see `CompiledCall`).

    The function is stopped at the first call with the verdict WRONG: rounding cannot explain the
    error of this call. If gradients are enabled, as they are by default, `function` can run a
    backward pass and a step of an optimizer, and their calls are checked too.
    """
    report = OperationsReport()

    def record(call: CheckedCall) -> None:
        report.seen[call.name] += 1
        if call.judgment is None:
            report.not_checked[call.name] += 1
            return
        if call.judgment.verdict is Verdict.NOT_CHECKED:
            report.not_checked[call.name] += 1
        largest = max(report.largest.get(call.name, 0.0), call.judgment.ratio)
        report.largest[call.name] = largest
        verdict = call.judgment.verdict
        if verdict is Verdict.WRONG or (verdict is Verdict.DEGRADED and report.finding is None):
            report.finding = call.diagnose()
        if verdict is Verdict.WRONG:
            raise _FirstWrong

    with_gradients = torch.is_grad_enabled()
    # Turn inference mode off. In inference mode, PyTorch does not split composite operations: the
    # checker would get `linear` instead of the operations that `linear` calls.
    with torch.inference_mode(False), torch.set_grad_enabled(with_gradients):
        try:
            with uncompiled_flex_attention(), CallChecker(record):
                function(*inputs, **arguments)
        except _FirstWrong:
            pass
    return report


def first_wrong_operation(
    function: Callable[..., Any], *inputs: Any, **arguments: Any
) -> Finding | None:
    """Run `function(*inputs, **arguments)`, and describe the first ATen call that is wrong.

    If no call has the verdict WRONG, the first call with the verdict DEGRADED is described. Returns
    None if all compared calls pass. Random draws, such as `bernoulli_`, are not compared.
    """
    return check_operations(function, *inputs, **arguments).finding


@dataclass(frozen=True)
class CheckedCall:
    """An ATen call that ran, with the verdict on its outputs.

    `name` is the operation's name, such as "mm", or "compiled MLP" for compiled code.
    `dtype` is the dtype of the first floating-point
    output, or None if no output is floating-point. `attempt` is an object that can repeat the call,
    or None for a higher-order operator. `expected` has the exact value and the allowed error of
    each output; it is None for compiled code. `judgment` holds the verdict. If the call could not
    be compared, `expected` and `judgment` are None.
    """

    name: str
    dtype: torch.dtype | None
    attempt: Attempt | CompiledCall | None
    expected: list[Expected | None] | None
    judgment: Judgment | None

    def diagnose(self) -> Finding:
        """Repeat the call with other memory layouts and simpler operations, to find what is wrong.

        `attempt` and `judgment` must not be None.
        """
        assert self.attempt is not None
        assert self.judgment is not None
        if isinstance(self.attempt, CompiledCall):
            return self.attempt.describe(self.name, self.judgment)
        assert self.expected is not None
        return self.attempt.diagnose(self.expected, self.judgment)


class CallChecker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A PyTorch dispatch mode that runs and checks every ATen call, and passes it to `on_call`.

    `on_call` gets a `CheckedCall`. Calls of operations in `WITHOUT_VALUES`, such as `empty`, run
    without a check. When the checker runs a call, the dispatch modes that were entered before the
    checker also get this call. A device fault that a test plants is such a mode, so the checker
    gets the fault's wrong result. Compiled code runs without dispatch modes, and is checked at the
    start of each call. Then the function runs as it is written. Higher-order operators such as
    `flex_attention` run, but are not compared.
    """

    supports_higher_order_operators = True

    def __init__(self, on_call: Callable[[CheckedCall], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_call = on_call
        self.watch = ExitStack()

    def __enter__(self) -> "CallChecker":
        self.watch.enter_context(watched(self._compiled))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.watch.close()

    def _compiled(self, call: CompiledCall) -> None:
        for name, dtype, judgment in call.judge():
            self.on_call(CheckedCall(name, dtype, call, None, judgment))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (args, kwargs or {})
        if isinstance(func, HigherOrderOperator):
            output = func(*args, **given[1])
            self.on_call(CheckedCall(str(func), first_float(output), None, None, None))
            return output
        name = operation_name(func)
        if name in WITHOUT_VALUES:
            return func(*args, **given[1])
        if name not in RULES:
            # In inference mode, PyTorch does not split composite operations such as `einsum`. Split
            # them here, because the parts have rules.
            with self:
                output = func.decompose(*args, **given[1])
            if output is not NotImplemented:
                return output
        attempt = Attempt(func, *given)
        output = func(*args, **given[1])
        results = computed(func, *given, output)
        expected, judgment = attempt.check(results)
        self.on_call(CheckedCall(name, first_float(results), attempt, expected, judgment))
        return output
