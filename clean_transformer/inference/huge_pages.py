"""Moves weights to huge pages of memory, from which Linux reads them faster."""

import ctypes
import sys
from functools import cache
from typing import Any

from torch import Tensor

# The size of a huge page in bytes, on x86-64 and on Arm processors with pages of 4 KiB.
HUGE_PAGE = 2**21

# Smaller weights gain nothing, because they stay in the processor's cache.
SMALLEST = 2**19

# Linux's number of the advice MADV_COLLAPSE, which Python does not define.
MADV_COLLAPSE = 25


def use_huge_pages(weight: Tensor) -> None:
    """Ask Linux to move `weight` to pages of 2 MiB. If Linux cannot do so, nothing happens.

    To find the memory of a weight, the processor looks up each page that the weight occupies. There
    are 512 times fewer pages of 2 MiB than pages of 4 KiB. The values and the addresses stay the
    same. Linux can do so since version 6.1. On other systems and devices, and for a weight of less
    than 0.5 MiB, nothing happens. The elements of `weight` must have no gaps between them.
    """
    size = weight.numel() * weight.element_size()
    if sys.platform != "linux" or weight.device.type != "cpu" or size < SMALLEST:
        return
    # The first and the last huge page can also contain other tensors, which is harmless.
    first = weight.data_ptr() // HUGE_PAGE * HUGE_PAGE
    last = -(-(weight.data_ptr() + size) // HUGE_PAGE) * HUGE_PAGE
    madvise()(first, last - first, MADV_COLLAPSE)


@cache
def madvise() -> Any:
    """Return the function `madvise` of the C library, with the types of its arguments."""
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
