"""Settings under which a healthy CPU rounds differently, for `benchmarks.corpus`."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode


class InOrder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the terms of float32 matrix products one after the other, as a plain loop does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name not in ("aten::mm", "aten::addmm") or kwargs or args[-1].dtype != torch.float32:
            return func(*args, **(kwargs or {}))
        *bias, left, right = args
        total = left.new_zeros(len(left), right.shape[1])
        for column, row in zip(left.T, right, strict=True):
            total = total + column[:, None] * row
        return total + bias[0] if bias else total


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of threads of PyTorch's CPU kernels to `count` inside a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def flushing() -> Iterator[None]:
    """Let the CPU replace subnormal numbers by 0 inside a `with` block."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def nothing() -> AbstractContextManager[Any]:
    """Return a context manager that changes no setting."""
    return nullcontext()


# For each setting: environment variables for a new process, and a function that returns a context.
SETTINGS: dict[str, tuple[dict[str, str], Any]] = {
    "default": ({}, nothing),
    "one thread": ({}, lambda: threads(1)),
    "two threads": ({}, lambda: threads(2)),
    "MATH attention": ({}, lambda: sdpa_kernel(SDPBackend.MATH)),
    "in-order sums": ({}, InOrder),
    "oneDNN off": ({}, lambda: torch.backends.mkldnn.flags(enabled=False)),
    "flush subnormals": ({}, flushing),
    "ONEDNN_MAX_CPU_ISA=SSE41": ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, nothing),
    "ONEDNN_MAX_CPU_ISA=AVX2": ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, nothing),
    "MKL_CBWR=COMPATIBLE": ({"MKL_CBWR": "COMPATIBLE"}, nothing),
    "MKL_CBWR=AVX2": ({"MKL_CBWR": "AVX2"}, nothing),
    "ATEN_CPU_CAPABILITY=default": ({"ATEN_CPU_CAPABILITY": "default"}, nothing),
    "ATEN_CPU_CAPABILITY=avx2": ({"ATEN_CPU_CAPABILITY": "avx2"}, nothing),
}
