"""Choosing dtypes by name. Importing this file imports no PyTorch: help texts list the names."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("float64", "float32", "bfloat16", "float16")


def choose_dtype(name: str) -> "torch.dtype":
    """Return the dtype with that name. Raises `ValueError` for an unknown name."""
    import torch

    if name not in DTYPES:
        raise ValueError(f"no dtype {name!r}; choose from {', '.join(DTYPES)}")
    return getattr(torch, name)


def choose_dtypes(names: str) -> list[str]:
    """Split names such as "float32,float16", or "all". Raises `ValueError` for an unknown name."""
    return choose_names("dtype", names, DTYPES)


def choose_names(what: str, names: str, known: Iterable[str]) -> list[str]:
    """Split names with commas between them; "all" gives all `known` names.

    Raises `ValueError` for a name that is not `known`; the message calls it a `what`.
    """
    choices = [*known]
    chosen = choices if names == "all" else names.split(",")
    for name in chosen:
        if name not in choices:
            raise ValueError(f"no {what} {name!r}; choose from {', '.join(choices)}, all")
    return chosen
