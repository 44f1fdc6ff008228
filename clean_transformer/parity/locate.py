"""Finds the ATen operation that causes the first activation with too large an error."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from clean_transformer.analysis.comparison import LOGITS
from clean_transformer.hooks import HookedModule
from clean_transformer.parity.activations.isolated import watched_names
from clean_transformer.parity.activations.oracle_run import owner_of
from clean_transformer.parity.operations.call import Operand
from clean_transformer.parity.operations.check import first_wrong_operation
from clean_transformer.parity.operations.diagnosis import Finding
from clean_transformer.parity.operations.leads import describe_issue, match
from clean_transformer.parity.operations.script import reproduction_script


@dataclass(frozen=True)
class Located:
    """A description of the first wrong operation, for the report.

    `where` is the activation, or the check of a single operation, in which the operation was found.
    `operation` is the operation's ATen name, and `operands` describes the dtype and the memory
    layout of each tensor argument. `ratio` is the largest error in units of one rounding error (see
    `Judgment`), and `bits` is the number of correct bits. `diagnosis` says under which condition
    the operation is wrong, for example if an argument is not contiguous. `known` describes the
    entries of `operations/known_issues.py` that the call matches. A match suggests a cause, but
    does not prove it. `script` is a Python script that reproduces the error and needs only torch.
    It is empty for compiled code.
    """

    where: str
    operation: str
    operands: tuple[str, ...]
    ratio: float
    bits: float
    diagnosis: str
    known: tuple[str, ...]
    script: str


def locate(module: HookedModule, name: str, path: str, *inputs: Tensor) -> Located | None:
    """Find the first wrong operation that contributes to the activation `name`.

    The search has two steps. First, the submodule that computes this activation runs alone, on the
    inputs that it gets when `module` runs on `inputs`, and all its operations are checked. If all
    of them are right, the whole `module` runs on `inputs`, because the wrong operation may be
    outside of the submodule. In both runs, hooks watch the activations that belong to `path`:
    "fused", "explicit" or "per head" (see `PATHS` in `activations/isolated.py`). Returns None if
    neither run has a wrong operation, or if the submodule is not a `HookedModule`.
    """
    owner = owner_of(name)[0]
    part = module.get_submodule(owner)
    if isinstance(part, HookedModule):
        for searched, args in ((part, _inputs_of(part, module, *inputs)), (module, inputs)):
            names = _names(searched, path)
            run = partial(searched.run_with_cache, names_filter=names) if names else searched
            finding = first_wrong_operation(run, *args)
            if finding is not None:
                return in_words(finding, name or LOGITS)
    return None


def in_words(finding: Finding, where: str) -> Located:
    """Describe `finding`, a call of an operation whose result on the device is wrong.

    `where` is the name of the activation whose computation made the call. If the operation was
    checked alone, `where` is the name of this check.
    """
    known = [describe_issue(issue) for issue in match(finding)]
    return Located(
        where=where,
        operation=finding.call.operation,
        operands=tuple(_describe(operand) for operand in finding.call.operands),
        ratio=finding.ratio,
        bits=finding.bits,
        diagnosis=finding.diagnosis,
        known=tuple(known),
        script=reproduction_script(finding) if finding.func else "",
    )


def _names(module: HookedModule, path: str) -> list[str]:
    return [name for name in watched_names(module, path) if name]


def _inputs_of(part: nn.Module, module: HookedModule, *inputs: Tensor) -> tuple[Any, ...]:
    seen: list[tuple[Any, ...]] = []
    handle = part.register_forward_pre_hook(lambda _, args: seen.append(args))
    try:
        module(*inputs)
    finally:
        handle.remove()
    return seen[0]


def _describe(operand: Operand) -> str:
    dtype = str(operand.dtype).removeprefix("torch.")
    return (
        f"{dtype} {[*operand.shape]}, stride {[*operand.stride]}, "
        f"storage offset {operand.storage_offset}, {operand.device}"
    )
