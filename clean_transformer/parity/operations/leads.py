"""Finds the known issues that may be the cause of a finding, on the device at hand."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from clean_transformer.parity.operations.diagnosis import Finding
from clean_transformer.parity.operations.known_issues import ARM, KNOWN_ISSUES, X86, KnownIssue

# The kinds of devices that a planted fault emulates. Empty if no such fault is planted.
_emulated: ContextVar[tuple[str, ...]] = ContextVar("emulated", default=())


@contextmanager
def emulating(devices: tuple[str, ...]) -> Iterator[None]:
    """Inside a `with` block, `match` finds the issues of `devices`, as if the code ran there.

    If `devices` is empty, nothing changes.
    """
    token = _emulated.set(devices or _emulated.get())
    try:
        yield
    finally:
        _emulated.reset(token)


def kind_of_device(device_type: str) -> str:
    """The kind of a device, as in `KnownIssue.devices`. CPUs have different kinds.

    A CPU of another kind than "arm" and "x86" has the kind that the operating system names.
    """
    if device_type != "cpu":
        return device_type
    machine = platform.machine().lower()
    kinds = {"x86_64": X86, "amd64": X86, "i686": X86, "arm64": ARM, "aarch64": ARM}
    return kinds.get(machine, machine)


def match(finding: Finding) -> list[KnownIssue]:
    """Return the known issues of the finding's device that the finding matches.

    The call must meet the condition of the issue, and the finding must have the issue's cause.
    Issues that the running PyTorch has not fixed come first. Both groups are in the order of
    `KNOWN_ISSUES`. A match does not prove that the issue causes the error.
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
    return sorted(found, key=lambda issue: issue.is_fixed)


def describe_issue(issue: KnownIssue) -> str:
    """Describe a known issue in a line: its source, its versions, and the workaround."""
    devices = f" on {', '.join(issue.devices)}"
    since = f", since torch {issue.since}" if issue.since else ""
    fixed = f", fixed in torch {issue.fixed_in}" if issue.fixed_in else ""
    if issue.is_fixed:
        fixed += f" (this is torch {torch.__version__}: it is back, or this is another fault)"
    return f"{issue.name}: {issue.seen}{devices}{since}{fixed}; {issue.workaround}"
