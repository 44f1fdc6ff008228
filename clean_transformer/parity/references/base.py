"""`Reference`: another implementation of GPT-2 that runs our weights, under our activations' names.

Each other file of this folder adds one implementation, and `choose.py` finds it there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from jaxtyping import Int
from torch import Tensor

from clean_transformer.analysis.comparison import LOGITS as LOGITS
from clean_transformer.config import Config
from clean_transformer.weights.table import State

# What is compared besides hook points, the outputs of submodules and the LOGITS.
TOKENS, POSITIONS = "tokens", "positions"


class ReferenceUnavailable(RuntimeError):
    """The reference is not installed, or it cannot hold this model."""


@dataclass(frozen=True)
class Reference:
    """A model of another implementation, which computes the same function as ours.

    `run(tokens)` returns every activation that the implementation caches, by its own key. A key is
    one of our names: a hook point, a submodule for its output, or TOKENS, POSITIONS or LOGITS. Any
    other key is translated by `aliases`.
    """

    title: str
    run: Callable[[Int[Tensor, "batch pos"]], Mapping[str, Tensor]]
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Implementation:
    """What a file of this folder has as `IMPLEMENTATION`.

    `build(cfg, state)` returns the `Reference` with our parameters, in their dtype, on the CPU, and
    raises `ReferenceUnavailable`. The name "auto" stands for the installed implementation with the
    lowest `rank`.
    """

    name: str
    build: Callable[[Config, State], Reference]
    is_installed: Callable[[], bool]
    rank: int


def major_version(package: str) -> int | None:
    """The first number of the installed version; None where the package is not installed."""
    try:
        return int(version(package).split(".")[0])
    except PackageNotFoundError:
        return None


def import_package(package: str, extra: str) -> Any:
    """The package. Raises `ReferenceUnavailable` with the extra to install where it is missing."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # the package is there, and something that it needs is not
            raise
        message = f"{package} is not installed; install the extra {extra!r}"
        raise ReferenceUnavailable(message) from None
