"""`assert_parity`: checks a module in your own tests the way the parity suite checks GPT-2."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from clean_transformer.hooks import HookedModule
from clean_transformer.parity.activations.black_box import (
    as_written,
    first_tensor,
    has_black_boxes,
    is_black_box,
    isolate_black_boxes,
    judge_black_box,
)
from clean_transformer.parity.activations.bounds import formula_of
from clean_transformer.parity.activations.isolated import PATHS, Isolated, isolate
from clean_transformer.parity.locate import locate
from clean_transformer.parity.oracle import float64_oracle, trusted
from clean_transformer.parity.report.wording import describe, located_lines
from clean_transformer.parity.results import first_bad_activation
from clean_transformer.parity.same_function import compare_tensors
from clean_transformer.parity.verdict import SAME_FUNCTION, Verdict
from clean_transformer.support.devices import resolve_device
from clean_transformer.support.numerics import upcast


@torch.no_grad()
def assert_parity(
    module: nn.Module,
    *inputs: Tensor,
    reference: nn.Module | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Assert that the module equals the reference, and that the device computes it accurately.

    If there is a `reference`, the module and the reference run on the same inputs in float64 on
    the CPU. Their outputs must agree to 1e-12 of the output's scale.

    Then a copy of the module runs on `device` in `dtype`. The error of every activation at a hook
    point must be within the rounding bound of the operation that computes this activation.

    A module whose `forward` is not one of ours is a black box. Only its output is checked: for each
    row, the difference from a float64 run of the same module is compared with the change that
    random rounding causes in this row. Optimized modules are also black boxes. Their float64 run
    uses the unoptimized module. An optimized module runs optimized only if it is already on
    `device` in `dtype`; otherwise the unoptimized copy is checked.

    Raises `AssertionError` if a check fails. If an activation is bad, the message names the first
    bad activation, its error, and the operation that caused the error, if one is found. `module`
    and `reference` are not changed.
    """
    if reference is not None:
        _assert_same_function(module, reference, *inputs)

    chosen = resolve_device(device)
    hooked = isinstance(module, HookedModule)
    # Do not copy an optimized module: the copy would notice that its weights have moved, and run
    # the unoptimized `forward`.
    as_it_is = hooked and has_black_boxes(module) and _is_there(module, chosen, dtype)
    under_test = module if as_it_is else deepcopy(module).to(chosen, dtype)
    given = [_to(x, dtype).to(chosen) for x in inputs]
    with trusted():
        plain = as_written(module) if hooked else deepcopy(module)
        oracle = float64_oracle(plain.to("cpu", dtype))
    where = f"{type(module).__name__} on {chosen} in {str(dtype).removeprefix('torch.')}"
    bad = first_bad_activation(_isolated_errors(under_test, oracle, *given))
    if bad is not None:
        lines = [f"{where} is {bad.verdict.value}: {describe(bad)}"]
        if isinstance(under_test, HookedModule) and bad.path in PATHS:
            located = locate(under_test, bad.name, bad.path, *given)
            lines += located_lines(located) if located else []
        raise AssertionError("\n".join(lines))


def _isolated_errors(under_test: nn.Module, oracle: nn.Module, *given: Tensor) -> list[Isolated]:
    case = "the inputs given"
    hooked = [each for each in (under_test, oracle) if isinstance(each, HookedModule)]
    if len(hooked) < 2 or is_black_box(under_test) or not _has_formulas(oracle):
        output = first_tensor(under_test(*given)).cpu()
        with trusted():
            return [judge_black_box("output", "", output, oracle, *(x.cpu() for x in given))]
    model, exact = hooked
    if has_black_boxes(model):
        return isolate_black_boxes(model, exact, *given, case=case)
    return [row for path in PATHS for row in isolate(model, exact, *given, path=path, case=case)]


def _has_formulas(module: nn.Module) -> bool:
    """Whether `formula_of` finds error bounds for `module` and every submodule of our classes."""
    parts = (part for part in module.modules() if isinstance(part, HookedModule))
    return all(formula_of(part) is not None for part in parts)


def _is_there(module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    return all(each.device == device and each.dtype == dtype for each in module.parameters())


def _assert_same_function(module: nn.Module, reference: nn.Module, *inputs: Tensor) -> None:
    with trusted():
        ours, theirs = (
            deepcopy(each).cpu().double()(*(upcast(x.cpu()) for x in inputs))
            for each in (module, reference)
        )
        row = compare_tensors("output", "output", ours, theirs, SAME_FUNCTION)
    if row.verdict is not Verdict.PASS:
        raise AssertionError(
            f"{type(module).__name__} is not the function of {type(reference).__name__}: in "
            f"float64 the outputs differ by {row.error:.1e} of their scale, where rounding leaves "
            f"less than {row.tolerance:g}; {row.note}".rstrip("; ")
        )


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
