"""The unit roundoffs of the dtypes, and of what a device may use instead."""

import torch

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
