"""Faults that tests plant on purpose, to see whether the checks find them.

A semantic fault changes the function that our model computes. A device fault makes an operation on
the CPU return what a faulty device would return. The faults are in the tables SEMANTIC_FAULTS and
DEVICE_FAULTS. Every fault has a name, by which `inject` plants it:

    with inject("linear-noncontiguous-weight"):
        logits = model(tokens)
"""

import difflib
from contextlib import AbstractContextManager
from typing import Any

from clean_transformer.parity.faults.device import DEVICE_FAULTS
from clean_transformer.parity.faults.semantic import SEMANTIC_FAULTS


def inject(name: str) -> AbstractContextManager[Any]:
    """Return a context manager that plants the fault called `name` inside a `with` block.

    To plant several faults, nest their `with` blocks. Raises `ValueError` for an unknown name.
    """
    faults = {fault.name: fault for fault in (*SEMANTIC_FAULTS, *DEVICE_FAULTS)}
    if name not in faults:
        near = difflib.get_close_matches(name, faults, n=3, cutoff=0.3)
        raise ValueError(f"no fault is called {name!r}; did you mean one of {near}?")
    return faults[name].plant()
