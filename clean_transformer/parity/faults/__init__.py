"""Faults that tests plant on purpose, to see whether the parity suite finds them.

A semantic fault is a mistake in the code of our model, so that the model computes another function.
A device fault makes an operation on the CPU return what a faulty device would return. The tables
SEMANTIC_FAULTS, CACHE_FAULTS (mistakes in the KV cache and in padding) and DEVICE_FAULTS list the
faults that `inject` plants by their names:

    with inject("linear-noncontiguous-weight"):
        logits = model(tokens)

Two other tables list faults that need more than a `with` block: MODE_FAULTS (in `modes`), for
optimized and compiled models, and LOADER_FAULTS (in `loader`), for the code that reads weights.
"""

import difflib
from contextlib import AbstractContextManager
from typing import Any

from clean_transformer.parity.faults.device import DEVICE_FAULTS
from clean_transformer.parity.faults.semantic import CACHE_FAULTS, SEMANTIC_FAULTS


def inject(name: str) -> AbstractContextManager[Any]:
    """Return a context manager that plants the fault called `name` inside a `with` block.

    To plant several faults, nest their `with` blocks. Raises `ValueError` for an unknown name.
    """
    faults = {fault.name: fault for fault in (*SEMANTIC_FAULTS, *CACHE_FAULTS, *DEVICE_FAULTS)}
    if name not in faults:
        near = difflib.get_close_matches(name, faults, n=3, cutoff=0.3)
        raise ValueError(f"no fault is called {name!r}; did you mean one of {near}?")
    return faults[name].plant()
