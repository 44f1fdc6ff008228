"""Writes a Python script that reproduces a finding, for example to attach it to a bug report."""

import math
from collections.abc import Iterator
from textwrap import fill
from typing import Any

import torch

from clean_transformer.parity.limits import LINEAR, SCRIPT_HEALTHY
from clean_transformer.parity.operations.attention import ATTENTIONS, attention_source
from clean_transformer.parity.operations.call import Operand
from clean_transformer.parity.operations.diagnosis import Finding
from clean_transformer.parity.oracle import UNIT_ROUNDOFF

HEAD = '''\
"""{title}"""

import torch


def tensor(dtype, shape, stride, offset, low, high):
    """Seeded numbers, the first the highest, with that stride and storage offset in memory."""
    last = sum((n - 1) * step for n, step in zip(shape, stride))
    length = offset + max(last + 1, torch.Size(shape).numel())  # more than an expanded one needs
    base = torch.rand(length) if low >= 0 else torch.randn(length)
    base = base if dtype.is_floating_point else torch.randint(low, high + 1, (length,))
    base[offset] = high
    return base.to(dtype).to({device!r}).as_strided(shape, stride, offset)


def exact(x):
    """The same numbers on the CPU, contiguous, in float64."""
    x = x.cpu().clone(memory_format=torch.contiguous_format)
    return x.double() if x.is_floating_point() else x


torch.manual_seed(0)
'''


CLOSE = """\
error = torch.where(actual == expected, 0, (actual - expected).abs())
worst = float((error / ({u} * {scale})).nan_to_num(torch.inf, torch.inf).max())
assert worst <= {limit}, f"{name}: an error of {{worst:.3g}} rounding units, {limit} allowed\""""


EQUAL = """\
different = int((actual != expected).sum())
assert different == 0, f"{name}: {{different}} of {{actual.numel()}} results differ\""""


VALID = """\
inside = (actual >= 0) & (actual < {x}.shape[-1])
possible = inside & (exact({x}).gather(-1, actual.where(inside, 0).long()) > 0)
assert possible.all(), f"{name}: drew {{int((~possible).sum())}} impossible indices\""""


SUMS = frozenset(("mm", "bmm", "matmul", "linear", "addmm", "baddbmm", "sum", "mean"))


def reproduction_script(finding: Finding) -> str:
    """Return the source of a Python script whose `assert` fails on a device with this fault.

    The script needs only torch, and has fewer than 40 lines.

    The script makes tensors with the layouts of the finding's tensors, and fills them with random
    numbers of size 1. But the first element of each tensor is the largest value of the finding's
    tensor. The script then runs the operation on the device, and on the CPU in float64. The largest
    error that the script accepts is SCRIPT_HEALTHY · u · scale, or in half precision
    `LINEAR.healthy_in_half` · u · scale, where u is the unit roundoff. For the operations in SUMS,
    the scale is Σ|xW| in float32, and |expected| + √Σ(xW)² in half precision. For all other
    operations, the scale is 1 + |expected|. If the result of the operation has no rounding error,
    the two results must be equal. Every index that `multinomial` draws must have a weight above 0.
    """
    call = finding.call
    device = next((x.device for x in call.operands), "cpu")
    names = [f"x{number}" for number in range(len(call.operands))]
    title = f"{call.operation} on {device}, torch {torch.__version__}: {finding.diagnosis}."
    title = fill(title, 92).replace('"', "'")
    output = f"[{finding.judgment.output}]" if len(finding.func._schema.returns) > 1 else ""
    operation = f"torch.ops.{call.operation}"
    lines = [HEAD.format(title=title, device=device)]
    for name, layout, (low, high) in zip(names, call.operands, finding.ranges, strict=True):
        low, high = (low, high) if layout.dtype.is_floating_point else (int(low), int(high))
        low_high = f"{low:.4g}, {high:.4g}" if layout.dtype.is_floating_point else f"{low}, {high}"
        place = f"{layout.shape}, {layout.stride}, {layout.storage_offset}"
        lines.append(f"{name} = tensor({layout.dtype}, {place}, {low_high})")
    lines += _reference(finding, operation, output, names)
    lines.append(f"actual = {operation}({_arguments(finding, '{}')}){output}.cpu().double()")
    lines.append(_assertion(finding, operation, names))
    return "\n".join(lines) + "\n"


def _arguments(finding: Finding, form: str) -> str:
    """The source code of the call's arguments, separated by commas.

    `form` is a format string. The name of each tensor is put in place of its "{}". For example,
    "exact({})" turns the name "x0" into "exact(x0)".
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
    return [attention_source(), f"expected = attention({tensors}, {mask}, {scale})[0]"]


def _assertion(finding: Finding, operation: str, names: list[str]) -> str:
    call = finding.call
    if call.name == "multinomial":
        return VALID.format(name=call.operation, x=names[0])
    dtypes = [x.dtype for x in call.operands if x.dtype.is_floating_point]
    if finding.judgment.must_equal:
        return EQUAL.format(name=call.operation)
    halved = dtypes[0].itemsize == 2
    if call.name not in SUMS:
        scale = "(1 + expected.abs())"
    elif halved:
        squares = f"{operation}({_arguments(finding, 'exact({}).square()')})"
        scale = f"(expected.abs() + {squares}.sqrt())"
    else:
        scale = f"{operation}({_arguments(finding, 'exact({}).abs()')})"
    return CLOSE.format(
        name=call.operation,
        u=f"2**{math.log2(UNIT_ROUNDOFF[dtypes[0]]):.0f}",
        scale=scale,
        limit=f"{LINEAR.healthy_in_half:g}" if halved else SCRIPT_HEALTHY,
    )
