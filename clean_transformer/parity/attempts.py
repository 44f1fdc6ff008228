"""Runs measurements so that an exception in one measurement does not stop the others."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from clean_transformer.parity.verdict import Check, Verdict

Result = TypeVar("Result")
Other = TypeVar("Other")

# PyTorch raises a plain RuntimeError when an allocation on the CPU or on MPS fails. These are parts
# of its messages, in lower case.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
# PyTorch raises a plain RuntimeError when a kernel has no version for a dtype or device. These are
# parts of its messages, in lower case. The last one is of the fused optimizers.
LACKING = (
    "not implemented for",
    "not currently implemented for",
    "floating point tensors of supported devices",
)
# If `torch.compile` finds no working compiler, it raises an exception of a class with one of these
# names. We compare names, because importing `torch._dynamo` is slow.
NO_COMPILER = ("BackendCompilerFailed", "TritonMissing", "GPUTooOldForTriton")


@dataclass
class Attempts:
    """Runs measurements, and collects the exceptions that they raise.

    `failed` has a `Check` (see `failed_check`) for each measurement that raised an exception.
    """

    failed: list[Check] = field(default_factory=list)

    def run(self, name: str, measure: Callable[[], Result], otherwise: Other) -> Result | Other:
        """Return `measure()`. If it raises an exception, return `otherwise`.

        The exception is described in `failed`. Ctrl-C is not an `Exception`, so it still stops the
        program.
        """
        try:
            return measure()
        except Exception as error:
            self.failed.append(failed_check(name, error))
            return otherwise


def failed_check(name: str, error: Exception) -> Check:
    """Return a `Check` that describes a measurement that raised `error`.

    `name` is the name of the measurement. The verdict is NOT CHECKED if `torch.compile` finds no
    working compiler, or if the device lacks an operation or a dtype. Otherwise the verdict is
    ERROR.
    """
    chain = [*causes(error)]
    texts = [str(each).lower() for each in chain]
    first, *others = str(error).strip().splitlines() or [""]
    if first.endswith(":") and others:  # as in Dynamo's "backend='inductor' raised:"
        first = f"{first} {others[0].strip()}"
    reason = f"{type(error).__name__}: {first}".removesuffix(": ")
    if any(isinstance(each, (MemoryError, torch.OutOfMemoryError)) for each in chain) or any(
        part in text for text in texts for part in OUT_OF_MEMORY
    ):
        return Check(name, Verdict.ERROR, note=f"out of memory ({reason})")
    lacks = any(
        isinstance(each, NotImplementedError)
        or any(kind.__name__ in NO_COMPILER for kind in type(each).__mro__)
        for each in chain
    ) or any(part in text for text in texts for part in LACKING)
    return Check(name, Verdict.NOT_CHECKED if lacks else Verdict.ERROR, note=reason)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the exception, then the exception that caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or getattr(error, "inner_exception", None)
