"""Returns memory that the process has freed to the operating system."""

import ctypes
import sys


def give_back_memory() -> None:
    """Return freed memory to the operating system. Does nothing if the C library is not glibc.

    glibc keeps much of the memory that a process frees, and small objects between large tensors
    prevent later tensors from using it. So the memory of the process grows.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
