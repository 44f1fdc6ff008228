"""`Reference`: another implementation of GPT-2, which runs with our weights.

Each of the other files in this folder adds one implementation. `choose.py` finds these files.
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

# Names for two inputs of the model, which are compared as well.
TOKENS, POSITIONS = "tokens", "positions"


class ReferenceUnavailable(RuntimeError):
    """The reference is not installed, or it does not support this model."""


@dataclass(frozen=True)
class Reference:
    """A model of another implementation, with our weights.

    `title` names the implementation and its version. `run(tokens)` runs the model and returns every
    activation that the implementation caches, by the implementation's own keys. `aliases` maps such
    a key to our name for the same activation. A key without an alias must already be our name: a
    hook point, a submodule (for its output), TOKENS, POSITIONS or LOGITS.
    """

    title: str
    run: Callable[[Int[Tensor, "batch pos"]], Mapping[str, Tensor]]
    aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Implementation:
    """How to build a reference. A file of this folder offers one under the name `IMPLEMENTATION`.

    `build(cfg, state)` returns a `Reference` on the CPU with the parameters of `state`, in their
    dtype; it raises `ReferenceUnavailable` if it cannot. `is_installed()` says whether the needed
    package is installed. The reference "auto" is the installed one with the lowest `rank`.
    """

    name: str
    build: Callable[[Config, State], Reference]
    is_installed: Callable[[], bool]
    rank: int


def major_version(package: str) -> int | None:
    """The major version of an installed package; None if the package is not installed."""
    try:
        return int(version(package).split(".")[0])
    except PackageNotFoundError:
        return None


def import_package(package: str, extra: str) -> Any:
    """Import a package.

    Raises `ReferenceUnavailable` if the package is missing; the message names the extra to install.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # the package is installed, but one of its dependencies is not
            raise
        message = f"{package} is not installed; install the extra {extra!r}"
        raise ReferenceUnavailable(message) from None
