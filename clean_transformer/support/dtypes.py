"""Chooses dtypes by name.

This file imports PyTorch only inside a function, so that the command line, whose help texts show
`DTYPES`, starts quickly.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = ("float64", "float32", "bfloat16", "float16")


def choose_dtype(name: "str | torch.dtype") -> "torch.dtype":
    """Return the dtype called `name`, such as "float16". A `torch.dtype` is returned unchanged.

    Raises `ValueError` for a dtype that is not in `DTYPES`.
    """
    import torch

    plain = str(name).removeprefix("torch.")
    if plain not in DTYPES:
        raise ValueError(f"no dtype {plain!r}; choose from {', '.join(DTYPES)}")
    return getattr(torch, plain)


def choose_dtypes(names: str) -> list[str]:
    """Split `names`, a comma-separated text, into a list of dtype names.

    If `names` is "all", returns all names in `DTYPES`. Raises `ValueError` for an unknown name.
    """
    return choose_names("dtype", names, DTYPES)


def choose_names(what: str, names: str, known: Iterable[str]) -> list[str]:
    """Split `names`, a comma-separated text, into a list of names.

    If `names` is "all", returns all names in `known`. Raises `ValueError` for a name that is not in
    `known`. In the error message, `what` is the word for such a name, for example "dtype".
    """
    choices = [*known]
    chosen = choices if names == "all" else names.split(",")
    for name in chosen:
        if name not in choices:
            raise ValueError(f"no {what} {name!r}; choose from {', '.join(choices)}, all")
    return chosen
