"""Question 3: which operation makes the first bad activation?"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from clean_transformer.analysis.comparison import LOGITS
from clean_transformer.hooks import HookedModule
from clean_transformer.parity.activations.isolated import owner_of, watched_names
from clean_transformer.parity.operations.call import Operand
from clean_transformer.parity.operations.check import first_wrong_operation
from clean_transformer.parity.operations.diagnosis import Finding
from clean_transformer.parity.operations.known_issues import match
from clean_transformer.parity.operations.script import reproduction_script


@dataclass(frozen=True)
class Located:
    """The first wrong operation, in words.

    `where` is the activation or the single operation in which it was found. `ratio` is its error in
    roundings, `bits` its number of correct bits. `known` are the known issues that it matches: a
    lead, not a proof. `script` is a Python script that reproduces it with torch alone.
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
    """Find the first wrong operation behind an activation.

    `module` runs on `inputs`, with the hooks of `path`. The submodule that makes the activation
    `name` is searched first, given its own inputs from that run. If all of its operations are
    right, `module` as a whole is searched, because the operation may stand between submodules.
    Returns None if no operation is wrong this time.
    """
    owner = owner_of(name)[0]
    part = module.get_submodule(owner)
    if isinstance(part, HookedModule):
        for searched, args in ((part, _inputs_of(part, module, *inputs)), (module, inputs)):
            run = partial(searched.run_with_cache, names=_names(searched, path))
            finding = first_wrong_operation(run, *args)
            if finding is not None:
                return in_words(finding, name or LOGITS)
    return None


def in_words(finding: Finding, where: str) -> Located:
    """The finding as a report states it; `where` says in which activation or operation."""
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
