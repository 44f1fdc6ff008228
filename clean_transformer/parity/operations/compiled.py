"""Checks compiled code: compares each call of a compiled function with the uncompiled function.

PyTorch runs no compiled code while a dispatch mode is active, and the checks of single operations
are dispatch modes. So a check would go around the compiled code. `watched` tells the checks about
each call of a compiled function, and `CompiledCall.judge` runs the compiled code and judges its
outputs and gradients.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from clean_transformer.parity.activations.black_box import DRAWS, judge_output, tensors
from clean_transformer.parity.activations.exact import OnCpuInFloat64
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.graphs import counts, runs_graph
from clean_transformer.parity.operations.call import Call, Operand
from clean_transformer.parity.operations.diagnosis import Cause, Finding
from clean_transformer.parity.operations.judgment import Judgment
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, trusted
from clean_transformer.parity.rounding import RandomRounding
from clean_transformer.support.numerics import upcast
from clean_transformer.support.replaced import replaced

# The function of PyTorch that runs at the start of each call of a compiled function. OLD_ENTRY is
# that of PyTorch before 2.6.
ENTRY, OLD_ENTRY = "_callback_from_stance", "set_eval_frame"
UNKNOWN_CALL = f"torch {torch.__version__} calls compiled code in a way that cannot be checked"
# The local variables of PyTorch's function that calls a compiled function.
CALL = {"self", "fn", "args", "kwargs"}
# The names of the backward passes of compiled code end with this text.
BACKWARD = ", backward"


@dataclass(frozen=True)
class CompiledCall:
    """A call of a compiled function.

    `function` is the function as it is written, and `compiled` is the compiled function. `args` and
    `kwargs` are the arguments of the call.
    """

    function: Callable[..., Any]
    compiled: Callable[..., Any] = field(repr=False)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The function's name after "compiled ", such as "compiled MLP"."""
        owner = getattr(self.function, "__self__", None)
        name = type(owner).__name__ if isinstance(owner, nn.Module) else None
        return f"compiled {name or getattr(self.function, '__name__', 'function')}"

    def judge(self) -> Iterator[tuple[str, torch.dtype | None, Judgment | None]]:
        """Run the compiled function on copies of the arguments, and judge its results.

        The exact results come from the function as it is written, in float64 on the CPU. An error
        is judged like that of a module whose inner activations are not known (see
        `judge_black_box`). Yields the name, the dtype and the worst judgment of the outputs. If
        gradients are enabled, also yields those of the gradients with respect to arguments and
        parameters. The derivative of the loss by each output is then a fixed random number. The
        judgment is None without a floating-point output, and if no graph ran in the call, because
        the function then ran as it is written.

        Each output is judged in its own dtype, or in the lowest dtype that the function converts
        numbers to.
        """
        before = counts().compiled
        with _disable_current_modes():
            outputs, gradients, parameters = self._run(self.compiled, None)
            is_compiled = counts().compiled > before or runs_graph(
                lambda: self._run(self.compiled, None)
            )
        given = [output.detach().cpu() for output in outputs + gradients]
        if not given or not is_compiled:
            yield self.name, None, None
            return
        with trusted():
            exact, lowered = self._exact(parameters)
            dtypes = [max([each.dtype, *lowered], key=UNIT_ROUNDOFF.__getitem__) for each in given]
            moved = {
                dtype: [
                    self._exact(parameters, RandomRounding(dtype, seed=seed))[0]
                    for seed in range(DRAWS)
                ]
                for dtype in {*dtypes}
            }
            rows = [
                judge_output("", "", one, exact[n], [each[n] for each in moved[dtypes[n]]])
                for n, one in enumerate(given)
            ]
        yield self.name, given[0].dtype, _worst(rows[: len(outputs)])
        if gradients:
            yield f"{self.name}{BACKWARD}", given[0].dtype, _worst(rows[len(outputs) :])

    def describe(self, name: str, judgment: Judgment) -> Finding:
        """Return a `Finding` for the judgment of the outputs or gradients."""
        operands = [
            Operand.of(x) for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)
        ]
        diagnosis = "wrong when compiled: as it is written, the function has other results"
        call = Call(name.replace(" ", ".", 1), (*operands,), (), ())
        return Finding(call, None, (), {}, (), judgment, None, Cause.COMPILED, diagnosis)

    def _exact(
        self, parameters: list[Tensor], rounding: AbstractContextManager[Any] | None = None
    ) -> tuple[list[Tensor], set[torch.dtype]]:
        """Run the function as it is written in float64, under the given `RandomRounding` if any.

        Returns the outputs and gradients, and the lower dtypes that the function converts to.
        """
        with _in_float64(parameters), rounding or nullcontext(), OnCpuInFloat64() as mode:
            outputs, gradients, _ = self._run(self.function, parameters)
        return [each.detach() for each in outputs + gradients], mode.lowered

    def _run(
        self, function: Callable[..., Any], parameters: list[Tensor] | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the outputs, the gradients, and the parameters that have gradients.

        If `parameters` is None, the parameters are found in the graph that autograd made.
        """
        copied = _copied if parameters is None else _upcast
        with _disable_current_modes():
            args, kwargs = tree_map(copied, (self.args, self.kwargs))
        outputs = tensors(function(*args, **kwargs))
        roots = [output for output in outputs if output.requires_grad]
        inputs = [
            x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad
        ]
        if parameters is None:
            known = {id(x) for x in inputs}
            parameters = [x for x in _leaves(roots) if id(x) not in known]
        if not roots:
            return outputs, [], parameters
        generator = torch.Generator().manual_seed(0)
        with _disable_current_modes():
            factors = [
                torch.randn(each.shape, generator=generator).bfloat16().to(each) for each in roots
            ]
        found = torch.autograd.grad(roots, [*inputs, *parameters], factors, allow_unused=True)
        return outputs, [each for each in found if each is not None], parameters


@contextmanager
def watched(on_call: Callable[[CompiledCall], None]) -> Iterator[None]:
    """Inside a `with` block, call `on_call` at the start of each call of a compiled function.

    After `on_call`, the function runs as it is written. Compiled functions that `on_call` or
    another compiled function calls are left out. Before PyTorch 2.6, such a call raises
    `NotImplementedError` (see `can_watch`).
    """
    with ExitStack() as entered:
        if "torch._dynamo" in sys.modules:
            entered.enter_context(_watched(on_call))
        else:  # Nothing is compiled yet, and loading the compiler takes seconds.
            compile_function = torch.compile

            def load_and_compile(*args: Any, **kwargs: Any) -> Any:
                if "torch._dynamo" not in sys.modules:
                    import_module("torch._dynamo")
                    entered.enter_context(_watched(on_call))
                return compile_function(*args, **kwargs)

            entered.enter_context(replaced(torch, "compile", load_and_compile))
        yield


def can_watch() -> bool:
    """Whether this PyTorch lets `watched` see the calls of compiled functions."""
    return hasattr(torch.compiler, "set_stance")  # PyTorch 2.6 added both at once


@contextmanager
def _watched(on_call: Callable[[CompiledCall], None]) -> Iterator[None]:
    frames: Any = torch._dynamo.eval_frame
    name = ENTRY if can_watch() else OLD_ENTRY
    original, is_busy = getattr(frames, name), False

    def refused(callback: Any) -> Any:
        if callable(callback):
            raise NotImplementedError(UNKNOWN_CALL)
        return original(callback)

    def entered(callback: Any) -> Any:
        nonlocal is_busy
        if is_busy or original(callback) in (None, False):
            return original(callback)
        values, is_busy = _locals_of_call(frames.__file__), True
        function = values["fn"]
        compiled = values["self"](function)
        try:
            on_call(CompiledCall(function, compiled, values["args"], values["kwargs"]))
        finally:
            is_busy = False
        # Run this call as it is written. With the callback, PyTorch would find the dispatch mode,
        # and never again run the compiled code of this function.
        return None

    with replaced(frames, name, entered if can_watch() else refused):
        yield


def _locals_of_call(file: str) -> dict[str, Any]:
    """Return the local variables of the innermost running function of PyTorch's `file`.

    This function calls a compiled function. Raises `NotImplementedError` if its variables have
    unknown names, because the compiled code would not be checked.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != file:
        frame = frame.f_back  # the watch itself, or code that checks its types
    values = {} if frame is None else dict(frame.f_locals)
    if not values.keys() >= CALL:
        raise NotImplementedError(UNKNOWN_CALL)
    return values


def _copied(value: Any) -> Any:
    if isinstance(value, nn.Module | nn.Parameter):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return deepcopy(value)


def _upcast(value: Any) -> Any:
    copied = _copied(value)
    if isinstance(copied, Tensor) and not isinstance(copied, nn.Parameter):
        return upcast(copied.detach().cpu()).requires_grad_(value.requires_grad)
    return copied


@contextmanager
def _in_float64(parameters: list[Tensor]) -> Iterator[None]:
    """Give the parameters float64 values on the CPU, as autograd needs for float64 gradients."""
    values = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = upcast(parameter.data.cpu())
        yield
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value


def _leaves(outputs: list[Tensor]) -> list[Tensor]:
    """Return the tensors without an operation before them from which the outputs are computed."""
    found: list[Tensor] = []
    seen, nodes = set(), [output.grad_fn for output in outputs]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes += [before for before, _ in node.next_functions]
    return found


def _worst(rows: list[Isolated]) -> Judgment:
    number, row = max(enumerate(rows), key=lambda item: (item[1].verdict.severity, item[1].ratio))
    return Judgment(row.verdict, row.ratio, row.bits, number, row.worst_index, healthy=row.healthy)
