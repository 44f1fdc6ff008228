"""Question 3: from the first bad activation to the operation that makes it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from clean_transformer.hooks import HookedModule
from clean_transformer.parity.activations.isolated import owner_of, watched_names
from clean_transformer.parity.operations.call import Operand
from clean_transformer.parity.operations.check import first_wrong_operation
from clean_transformer.parity.operations.diagnosis import Finding
from clean_transformer.parity.operations.known_issues import match
from clean_transformer.parity.operations.script import reproduction_script


@dataclass(frozen=True)
class Located:
    """The operation behind a bad activation, or behind a bad probe, in words.

    `known` are the reports that it matches (a lead, not a proof); `script` reproduces it with
    torch alone.
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
    """The first wrong operation of the module that makes the activation, given its own input.

    Where that module is right by itself, the whole of `module` is searched: the operation stands
    between its parts. `None` if nothing goes wrong this time.
    """
    owner = owner_of(name)[0]
    part = module.get_submodule(owner)
    if isinstance(part, HookedModule):
        for searched, args in ((part, _inputs_of(part, module, *inputs)), (module, inputs)):
            run = partial(searched.run_with_cache, names=_names(searched, path))
            finding = first_wrong_operation(run, *args)
            if finding is not None:
                return in_words(finding, name or "logits")
    return None


def in_words(finding: Finding, where: str) -> Located:
    """What a report says of a finding."""
    known = [f"{fault.name}: {fault.seen}; {fault.workaround}" for fault in match(finding.call)]
    return Located(
        where=where,
        operation=finding.call.operation,
        operands=tuple(_describe(operand) for operand in finding.call.operands),
        ratio=finding.ratio,
        bits=finding.bits,
        diagnosis=finding.diagnosis,
        known=tuple(known),
        script=reproduction_script(finding),
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
