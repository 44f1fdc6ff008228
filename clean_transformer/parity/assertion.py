"""`assert_parity`: checks a module in your own tests the way the parity suite checks GPT-2."""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from clean_transformer.hooks import HookedModule
from clean_transformer.parity.activations.black_box import (
    all_tensors,
    as_written,
    has_black_boxes,
    is_black_box,
    is_compiled,
    isolate_black_boxes,
    judge_black_box,
    tensors,
)
from clean_transformer.parity.activations.bounds import formula_of
from clean_transformer.parity.activations.exact import Float64, OnCpuInFloat64
from clean_transformer.parity.activations.isolated import PATHS, Isolated, isolate
from clean_transformer.parity.locate import in_words, locate
from clean_transformer.parity.operations.check import check_operations
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, float64_oracle, trusted
from clean_transformer.parity.report.wording import describe, located_lines
from clean_transformer.parity.results import first_bad_activation
from clean_transformer.parity.same_function import compare_tensors
from clean_transformer.parity.verdict import SAME_FUNCTION, Verdict
from clean_transformer.support.devices import resolve_device
from clean_transformer.support.numerics import upcast
from clean_transformer.support.stand_in import stand_ins


@torch.no_grad()
def assert_parity(
    module: nn.Module,
    *inputs: Tensor,
    reference: nn.Module | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Assert that the module computes what `reference` computes, and is accurate on `device`.

    If there is a `reference`, the module and the reference run on the same inputs in float64 on the
    CPU, without compilation. Each pair of output elements a (of the module) and b (of the
    reference) must satisfy |a − b| ≤ 1e-12 (|b| + s), where s is the root mean square of all b.

    Then a copy of the module runs on `device` in `dtype`, and is compared with a float64 run of the
    same module on the CPU. What is checked depends on the module:

    - A module of this package: the error of every activation at a hook point must be within the
      rounding bound of the operation that computes this activation.
    - Any other module, including a subclass that replaces a method of a module of this package: the
      outputs are compared, and every ATen call is compared with the same call in float64. The error
      of an output row (a vector along the last axis) may be a few times as large as the change that
      random rounding causes (see `judge_black_box`).
    - An optimized or compiled module: only outputs are compared. The float64 run is neither
      optimized nor compiled. If an optimized module is not already on `device` in `dtype`, its
      unoptimized copy is checked.

    Raises `AssertionError` if dropout is active, if a check fails, or if nothing could be compared
    (NOT CHECKED). If the error of an activation is too large, the message names the first such
    activation, its error, and the operation that caused the error, if this operation was found.
    Raises `ValueError` if an output is complex, or if two runs on the same inputs have different
    outputs. Raises `ValueError` too if the module must be moved to another device or dtype, but was
    compiled with `module.compile()`, or your code has assigned a function to `module.forward`. A
    copy would run the `forward` of its class instead. `module` and `reference` are not changed.
    """
    _refuse_dropout(module)
    if reference is not None:
        _refuse_dropout(reference)
        _assert_same_function(module, reference, *inputs)

    chosen = resolve_device(device)
    under_test = _under_test(module, chosen, dtype)
    given = [_to(x, dtype).to(chosen) for x in inputs]
    with trusted():
        oracle = float64_oracle(as_written(module).to("cpu", dtype))
    where = f"{type(module).__name__} on {chosen} in {str(dtype).removeprefix('torch.')}"
    if given and not any(x.numel() for x in given):
        return _assert_shapes(where, under_test, oracle, *given)
    has_formulas = _has_formulas(under_test, oracle)
    rows, lowered = (
        (_isolated_errors(under_test, oracle, *given), "")
        if has_formulas
        else _errors_of_outputs(under_test, oracle, *given)
    )
    bad = first_bad_activation(rows)
    located = None
    if has_formulas:
        if bad is not None and bad.path in PATHS:
            located = locate(cast(HookedModule, under_test), bad.name, bad.path, *given)
    elif bad is None or not has_black_boxes(under_test):
        operations = check_operations(under_test, *given)
        if not rows and operations.verdict is Verdict.NOT_CHECKED:
            raise AssertionError(
                f"{where} is NOT CHECKED: it has no output of floating-point numbers to compare, "
                f"and {operations.compared.total()} of {operations.seen.total()} of its ATen calls "
                "could be compared"
            )
        found = operations.finding
        located = in_words(found, "this module") if found else None
    if bad is None and located is None:
        return None
    lines = [f"{where} is {bad.verdict.value}: {describe(bad)}{lowered}" if bad else f"{where}:"]
    raise AssertionError("\n".join(lines + (located_lines(located) if located else [])))


def _refuse_dropout(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
            raise AssertionError(
                f"{type(module).__name__} has active dropout: {name or 'itself'} (p = {part.p}) "
                "is in training mode, so that each run gives other numbers; call .eval() first"
            )


def _under_test(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a copy of the module on the device, or the module itself.

    The module itself is returned if it is on the device in the dtype, and if it or a submodule is
    compiled or optimized. Raises `ValueError` if a copy would not run the same code as the module.
    """
    is_there = all(each.device == device and each.dtype == dtype for each in module.parameters())
    if is_there and has_black_boxes(module):
        return module
    for part in module.modules():
        has_own = "forward" in vars(part) and not stand_ins(part)
        if has_own or getattr(part, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"a {type(part).__name__} is compiled, or has a forward of its own, and a copy on "
                f"{device} in {dtype} would run as it is written; first move the module there"
            )
    return deepcopy(module).to(device, dtype)


def _isolated_errors(model: Any, oracle: Any, *given: Tensor) -> list[Isolated]:
    case = "the inputs given"
    if has_black_boxes(model):
        return isolate_black_boxes(model, oracle, *given, case=case)
    return [row for path in PATHS for row in isolate(model, oracle, *given, path=path, case=case)]


def _errors_of_outputs(
    under_test: nn.Module, oracle: nn.Module, *given: Tensor
) -> tuple[list[Isolated], str]:
    """Compare each output tensor with a float64 run. Also return a note for the error message.

    The note names dtypes of lower precision to which the module itself converts numbers, or is
    empty.
    """
    outputs = [output.cpu() for output in tensors(under_test(*given))]
    on_cpu, widened = [x.cpu() for x in given], OnCpuInFloat64()
    _refuse_randomness(oracle, *on_cpu)

    def exact(number: int, *args: Any) -> Tensor:
        with widened:
            return tensors(oracle(*args))[number]

    with trusted():
        rows = [
            judge_black_box(
                f"output {number}" if number else "output",
                "",
                output,
                lambda *args, number=number: exact(number, *args),
                *on_cpu,
            )
            for number, output in enumerate(outputs)
        ]
    u = max((UNIT_ROUNDOFF[output.dtype] for output in outputs), default=0.0)
    lower = [
        str(dtype).removeprefix("torch.") for dtype in widened.lowered if UNIT_ROUNDOFF[dtype] > u
    ]
    return rows, f"; the module itself converts numbers to {', '.join(lower)}" if lower else ""


def _refuse_randomness(oracle: nn.Module, *inputs: Tensor) -> None:
    """Raise `ValueError` if two float64 runs on the same inputs have different outputs."""
    with trusted(), Float64():
        first, second = (tensors(oracle(*(upcast(x) for x in inputs))) for _ in range(2))
    if not all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)
    ):
        raise ValueError(
            f"two runs of {type(oracle).__name__} on the same inputs have different outputs, so "
            "they cannot be compared; if it draws random numbers (dropout), call .eval() first"
        )


def _has_formulas(under_test: nn.Module, oracle: nn.Module) -> bool:
    """Whether the error bounds of all activations are known (see `formula_of`).

    False if the module itself is optimized, or if any part of it is compiled: the hooks of a
    compiled module may not run.
    """
    if not isinstance(under_test, HookedModule) or is_black_box(under_test):
        return False
    parts = (part for part in oracle.modules() if isinstance(part, HookedModule))
    compiled = any(is_compiled(part) for part in under_test.modules())
    return not compiled and all(formula_of(part) is not None for part in parts)


def _assert_shapes(where: str, under_test: nn.Module, oracle: nn.Module, *given: Tensor) -> None:
    """Compare only the shapes of the outputs, because the inputs have no elements."""
    shapes = [[*output.shape] for output in tensors(under_test(*given))]
    with trusted():
        wanted = [[*output.shape] for output in tensors(oracle(*(upcast(x.cpu()) for x in given)))]
    if shapes != wanted:
        raise AssertionError(f"{where} is WRONG: its outputs have shapes {shapes}, not {wanted}")


def _assert_same_function(module: nn.Module, reference: nn.Module, *inputs: Tensor) -> None:
    with trusted(), Float64():
        ours, theirs = (
            all_tensors(as_written(each).cpu().double()(*(upcast(x.cpu()) for x in inputs)))
            for each in (module, reference)
        )
    differs = f"{type(module).__name__} is not the function of {type(reference).__name__}: "
    if len(ours) != len(theirs):
        raise AssertionError(f"{differs}{len(ours)} output tensors instead of {len(theirs)}")
    if not ours:
        raise AssertionError(f"{type(module).__name__} is NOT CHECKED: it returns no tensor")
    for number, (mine, wanted) in enumerate(zip(ours, theirs, strict=True)):
        row = compare_tensors("output", f"output {number}", mine, wanted, SAME_FUNCTION)
        if row.verdict is not Verdict.PASS:
            raise AssertionError(
                f"{differs}in float64 the outputs differ by {row.error:.1e} of their scale, where "
                f"rounding leaves less than {row.tolerance:g}; {row.note}".rstrip("; ")
            )


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
