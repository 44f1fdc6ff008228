"""What a run is made of: its devices, dtypes, modes, weights and tokens, chosen by name."""

from collections.abc import Collection

import torch

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def choose_dtypes(names: str) -> list[str]:
    """The dtypes named, between commas, or all. Raises `ValueError` for an unknown one."""
    return _choose("dtype", names, DTYPES)


def _choose(what: str, names: str, known: Collection[str]) -> list[str]:
    chosen = [*known] if names == "all" else names.split(",")
    for name in chosen:
        if name not in known:
            raise ValueError(f"no {what} {name!r}; choose from {', '.join(known)}, all")
    return chosen


def choose_dtype(name: str) -> torch.dtype:
    """The dtype of that name. Raises `ValueError` for an unknown one."""
    if name not in DTYPES:
        raise ValueError(f"no dtype {name!r}; choose from {', '.join(DTYPES)}")
    return DTYPES[name]
