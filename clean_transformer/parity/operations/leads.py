"""Finds reported device faults ("known issues") that may explain the wrong result of a call."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from clean_transformer.parity.operations.diagnosis import Finding
from clean_transformer.parity.operations.known_issue import ARM, ROCM, X86, KnownIssue
from clean_transformer.parity.operations.known_issues import KNOWN_ISSUES

# The kinds of devices that a planted fault emulates. Empty if no such fault is planted.
_emulated: ContextVar[tuple[str, ...]] = ContextVar("emulated", default=())


@contextmanager
def emulating(devices: tuple[str, ...]) -> Iterator[None]:
    """Inside a `with` block, make `match` look for issues of `devices`, not of the real device.

    `devices` has kinds of devices, such as "mps" or "x86". If it is empty, nothing changes.
    """
    token = _emulated.set(devices or _emulated.get())
    try:
        yield
    finally:
        _emulated.reset(token)


def kind_of_device(device_type: str) -> str:
    """Return the kind of a device, as in the table of known issues, such as "mps" or "x86".

    For "cuda", the kind is "rocm" if PyTorch is built for AMD's GPUs, and otherwise "cuda". For
    "cpu", the kind is that of the processor: "arm", "x86", or the operating system's name for
    another processor. For other devices, the kind is `device_type` itself.
    """
    if device_type == "cuda" and torch.version.hip:
        return ROCM
    if device_type != "cpu":
        return device_type
    machine = platform.machine().lower()
    kinds = {"x86_64": X86, "amd64": X86, "i686": X86, "arm64": ARM, "aarch64": ARM}
    return kinds.get(machine, machine)


def match(finding: Finding) -> list[KnownIssue]:
    """Return the known issues that may explain the wrong call `finding`.

    Such an issue was reported for the kind of device that ran the call. The call meets the
    condition of the issue, and the call's error has the same cause. A match does not prove that the
    issue causes the error. Issues that people saw in the running version of PyTorch come first,
    then those of older and newer versions, both in the order of `KNOWN_ISSUES`.
    """
    kinds = {kind_of_device(operand.device) for operand in finding.call.operands}
    kinds = {*_emulated.get()} or kinds
    found = [
        issue
        for issue in KNOWN_ISSUES
        if issue.matches(finding.call)
        and issue.cause is finding.cause
        and not kinds.isdisjoint(issue.devices)
    ]
    return sorted(found, key=lambda issue: issue.is_fixed or issue.is_newer)


def describe_issue(issue: KnownIssue) -> str:
    """Describe a known issue in one line: source, devices, dtypes, versions, and workaround.

    The line says if PyTorch's running version has the fix, or is older than the issue.
    """
    devices = f" on {', '.join(issue.devices)}"
    if issue.dtypes:
        devices += f" in {', '.join(str(dtype).removeprefix('torch.') for dtype in issue.dtypes)}"
    since = f", since torch {issue.since}" if issue.since else ""
    fixed = f", fixed in torch {issue.fixed_in}" if issue.fixed_in else ""
    if issue.is_fixed:
        fixed += f" (this is torch {torch.__version__}: it is back, or this is another fault)"
    if issue.is_newer:
        since += f" (this is torch {torch.__version__}: nobody reported it for so old a version)"
    return f"{issue.name}: {issue.seen}{devices}{since}{fixed}; {issue.workaround}"
