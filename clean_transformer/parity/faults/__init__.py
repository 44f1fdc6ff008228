"""Faults to plant, by name. They show what a check finds.

A semantic fault changes the function that our model computes. A device fault makes an operation on
the CPU return what a faulty device would return. Both kinds are tables, with one row a fault.

    with inject("linear-noncontiguous-weight"):
        logits = model(tokens)
"""

import difflib
from contextlib import AbstractContextManager
from typing import Any

from clean_transformer.parity.faults.device import DEVICE_FAULTS
from clean_transformer.parity.faults.semantic import SEMANTIC_FAULTS


def inject(name: str) -> AbstractContextManager[Any]:
    """Plant the fault of that name for the length of a `with` block. Faults nest.

    Raises `ValueError` for a name that no fault has.
    """
    faults = {fault.name: fault for fault in (*SEMANTIC_FAULTS, *DEVICE_FAULTS)}
    if name not in faults:
        near = difflib.get_close_matches(name, faults, n=3, cutoff=0.3)
        raise ValueError(f"no fault is called {name!r}; did you mean one of {near}?")
    return faults[name].plant()
