"""The float64 oracle on the CPU, and the precision of every dtype that it judges."""

from contextlib import AbstractContextManager
from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

M = TypeVar("M", bound=nn.Module)

# The largest relative error of one rounding.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# The precisions in which a device may compute float32 products, if a setting allows it.
LOWER_PRECISION = {
    UNIT_ROUNDOFF[torch.float16]: "TF32",  # it has float16's number of bits
    UNIT_ROUNDOFF[torch.bfloat16]: "bfloat16",
}

# The unit roundoff of the float32 in which kernels sum products of half precision.
ACCUMULATOR = UNIT_ROUNDOFF[torch.float32]


def smallest_kept(dtype: torch.dtype) -> float:
    """The underflow threshold: devices may flush smaller numbers to 0.

    Float16 keeps its subnormal numbers, so its threshold is the smallest of them.
    """
    return 2.0**-24 if dtype == torch.float16 else float(torch.finfo(dtype).tiny)


def trusted() -> AbstractContextManager[object]:
    """Run outside all dispatch modes, so that planted faults do not reach the oracle."""
    return _disable_current_modes()


def float64_oracle(module: M) -> M:
    """A float64 copy of the module on the CPU; the module's own device needs no float64."""
    with trusted():
        return deepcopy(module).cpu().double()
