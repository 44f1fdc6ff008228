"""The unit roundoffs of the dtypes, and of what a device may use instead."""

from contextlib import AbstractContextManager
from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

M = TypeVar("M", bound=nn.Module)

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


# What a device may compute float32 products in where a setting allows it, by unit roundoff.
LOWER_PRECISION = {2.0**-11: "TF32", 2.0**-8: "bfloat16"}


# What kernels sum products of half precision in.
ACCUMULATOR = UNIT_ROUNDOFF[torch.float32]


def smallest_kept(dtype: torch.dtype) -> float:
    """What lies below may be flushed to zero; float16 alone keeps its subnormal numbers."""
    return 2.0**-24 if dtype == torch.float16 else float(torch.finfo(dtype).tiny)


def trusted() -> AbstractContextManager[object]:
    """Run outside every dispatch mode: the oracle must see no injected fault and no refusal."""
    return _disable_current_modes()


def float64_oracle(module: M) -> M:
    """A copy of the module in float64 on the CPU, made without float64 on the module's device."""
    with trusted():
        return deepcopy(module).cpu().double()
