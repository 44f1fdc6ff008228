"""Describes a device fault that people have reported. `known_issues.py` has the table of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from clean_transformer.parity.operations.call import Call
from clean_transformer.parity.operations.conditions import is_dtype
from clean_transformer.parity.operations.diagnosis import Cause

Condition = Callable[[Call], bool]

ARM, X86, ROCM = "arm", "x86", "rocm"
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class KnownIssue:
    """A fault that people have reported, in one or several operations.

    `operations` has the names of the ATen operations, without namespace and overload.
    `condition(call)` is True if the fault affects a call of one of these operations. `devices` has
    the kinds of devices on which people saw the fault: "mps", "cuda", "rocm", "xpu", "arm" or
    "x86". `dtypes` has the dtypes in which they saw it; if empty, the dtype does not matter. `seen`
    cites the report.
    `workaround` says how to avoid the fault. `cause` is the `Cause` that `Attempt.diagnose` finds
    for this fault. `since` is the first version of PyTorch in which people saw the fault, and
    `fixed_in` is the first version that has a fix. Both are empty if not known.
    """

    name: str
    description: str
    operations: frozenset[str]
    condition: Condition
    devices: tuple[str, ...]
    seen: str
    workaround: str
    cause: Cause = Cause.VALUES
    since: str = ""
    fixed_in: str = ""
    dtypes: tuple[torch.dtype, ...] = ()

    def matches(self, call: Call) -> bool:
        """Whether the call would go wrong on a device that has this fault."""
        return (
            call.name in self.operations
            and (not self.dtypes or is_dtype(call, *self.dtypes))
            and self.condition(call)
        )

    @property
    def is_newer(self) -> bool:
        """Whether people saw the fault only in newer versions of PyTorch than the running one."""
        return bool(self.since) and torch.__version__ < self.since

    @property
    def is_fixed(self) -> bool:
        """Whether the running version of PyTorch has the fix."""
        return bool(self.fixed_in) and torch.__version__ >= self.fixed_in
