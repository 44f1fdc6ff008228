"""Writes a Python script that reproduces a wrong call, for example to attach it to a bug report."""

import ast
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import astuple
from textwrap import fill
from typing import Any, cast

import torch
from torch.utils._pytree import tree_leaves

from clean_transformer.parity.operations.attention import ATTENTIONS, attention
from clean_transformer.parity.operations.call import Call, Operand, sample
from clean_transformer.parity.operations.diagnosis import Finding
from clean_transformer.parity.operations.judgment import Judgment
from clean_transformer.parity.operations.replay import is_overwritten

HEAD = '''\
"""{title}"""

import torch

{sample}

def exact(x):
    """The same numbers on the CPU, contiguous, in float64."""
    x = x.cpu().clone(memory_format=torch.contiguous_format)
    return x.double() if x.is_floating_point() else x

torch.manual_seed(0)'''


CLOSE = """\
error, allowed = float(abs(actual - expected)[{index}]), {healthy} * {unit}
assert error <= allowed, f"{name}: an error of {{error:.3g}}, allowed {{allowed:.3g}}"
"""


EQUAL = """\
different = int((actual != expected).sum())
assert different == 0, f"{name}: {{different}} of {{actual.numel()}} results differ"
"""


VALID = """\
inside = (actual >= 0) & (actual < {x}.shape[-1])
possible = inside & (exact({x}).gather(-1, actual.where(inside, 0).long()) > 0)
assert possible.all(), f"{name}: drew {{int((~possible).sum())}} impossible indices"
"""


def reproduction_script(finding: Finding) -> str:
    """Return the source of a Python script that repeats the wrong call described by `finding`.

    The script's `assert` fails on a device that computes this call wrongly. The script needs only
    torch, and has fewer than 40 lines. If the operation takes lists of tensors, such as a fused
    step of AdamW, the script may have one more line for each tensor. It makes tensors with the
    memory layouts of the call, and fills them with random numbers of the same range, mean and
    standard deviation. It runs the operation on the device, and in float64 on the CPU.

    The script then asserts that the error of one element is as small as on a healthy device. This
    is the element that had the largest error in units of one rounding error. If the operation does
    not round, all results must be equal instead. If the operation is `multinomial`, every drawn
    index must have a weight above 0. If the random numbers do not show the fault, the first lines
    of the script say so.
    """
    call = finding.call
    device = next((x.device for x in call.operands), "cpu")
    names = [f"x{number}" for number in range(len(call.operands))]
    shown = finding.on_random or finding.judgment
    title = f"{call.operation} on {device}, torch {torch.__version__}: {finding.diagnosis}."
    title += "" if finding.on_random else " These random numbers did not show it."
    title = fill(title, 92).replace('"', "'")
    returns = finding.func._schema.returns
    has_several = len(returns) > 1 or any(str(each.type) == "List[Tensor]" for each in returns)
    output = f"[{shown.output}]" if has_several else ""
    operation = f"torch.ops.{call.operation}"
    lines = [HEAD.format(title=title, sample=source_of(sample))]
    for name, layout, numbers in zip(names, call.operands, finding.numbers, strict=True):
        values = ", ".join(_source(number, iter(()), "") for number in astuple(numbers))
        place = f"{layout.shape}, {layout.stride}, {layout.storage_offset}"
        lines.append(f"{name} = sample({device!r}, {layout.dtype}, {place}, {values})")
    if returns:
        lines += _reference(finding, operation, output, names)
        lines.append(f"actual = {operation}({_arguments(finding, '{}')}){output}.cpu().double()")
    else:
        lines += _overwritten(finding, operation, shown.output, names)
    lines.append(_assertion(call, shown, names))
    return "\n".join(lines)


def source_of(function: Callable[..., Any]) -> str:
    """Return the source code of a function without its type annotations.

    The annotations use names that a reproduction script does not import.
    """
    tree = ast.parse(inspect.getsource(function))
    definition = cast(ast.FunctionDef, tree.body[0])
    definition.returns = None
    for argument in definition.args.args:
        argument.annotation = None
    return ast.unparse(tree)


def _arguments(finding: Finding, form: str) -> str:
    """Return the source code of the arguments of the call in `finding`, separated by commas.

    `form` is a format string for the names of tensors: "exact({})" turns "x0" into "exact(x0)".
    """
    numbers = iter(range(len(finding.call.operands)))
    positional = [_source(value, numbers, form) for value in finding.arguments]
    keywords = [
        f"{name}={_source(value, numbers, form)}" for name, value in finding.keywords.items()
    ]
    return ", ".join(positional + keywords)


def _source(value: Any, numbers: Iterator[int], form: str) -> str:
    if isinstance(value, Operand):
        return form.format(f"x{next(numbers)}")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_source(part, numbers, form) for part in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, torch.Generator):
        return f"torch.Generator('{value.device}').manual_seed(0)"
    return f"torch.device('{value}')" if isinstance(value, torch.device) else repr(value)


def _reference(finding: Finding, operation: str, output: str, names: list[str]) -> list[str]:
    name = finding.call.name
    if name == "multinomial":
        return []
    if name not in ATTENTIONS:
        exact = f"{operation}({_arguments(finding, 'exact({})')}){output}"
        return [f"expected = {exact}.double()"]
    schema = finding.func._schema.arguments
    given = dict(zip((argument.name for argument in schema), finding.arguments, strict=False))
    given |= finding.keywords
    query, key = finding.call.operands[:2]
    mask = f"exact({names[3]})" if len(names) > 3 else "torch.zeros(())"
    if given.get("is_causal"):
        mask = f"torch.ones({query.shape[-2]}, {key.shape[-2]}).tril().bool()"
    scale = given.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tensors = ", ".join(f"exact({name})" for name in names[:3])
    return [source_of(attention), f"expected = attention({tensors}, {mask}, {scale})[0]"]


def _overwritten(finding: Finding, operation: str, output: int, names: list[str]) -> list[str]:
    """Return the lines for an operation that returns nothing, and overwrites some arguments.

    `output` is the index of the tensor to compare, in the list of all tensors that the operation
    overwrites.
    """
    place, written = 0, []
    for argument, value in zip(finding.func._schema.arguments, finding.arguments, strict=False):
        operands = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Operand)]
        written += names[place : place + len(operands)] if is_overwritten(argument) else []
        place += len(operands)
    name = written[output]
    exact = ", ".join(f"exact({each})" for each in names)
    return [
        f"{', '.join(f'exact_{each}' for each in names)}, = {exact},",
        f"{operation}({_arguments(finding, 'exact_{}')})",
        f"expected = exact_{name}",
        f"{operation}({_arguments(finding, '{}')})",
        f"actual = {name}.cpu().double()",
    ]


def _assertion(call: Call, shown: Judgment, names: list[str]) -> str:
    if call.name == "multinomial":
        return VALID.format(name=call.operation, x=names[0])
    if shown.must_equal:
        return EQUAL.format(name=call.operation)
    unit, healthy = f"{shown.unit:.6g}", f"{shown.healthy:.6g}"
    index = shown.worst if shown.worst else "..."
    return CLOSE.format(name=call.operation, index=index, healthy=healthy, unit=unit)
