"""Other implementations of GPT-2, given our weights, with their activations under our names.

The only module that imports `transformer_lens` or `transformers`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from typing import Any

from jaxtyping import Int
from torch import Tensor

# What is compared besides hook points and the outputs of submodules.
TOKENS, POSITIONS, LOGITS = "tokens", "positions", "logits"


Shows = Callable[[Any, Any], dict[str, Tensor]]


class ReferenceUnavailable(RuntimeError):
    """The reference is not installed, or cannot hold this model."""


@dataclass(frozen=True)
class Reference:
    """Another implementation of the same function.

    `run` gives every activation that it caches, by its own key. A key is one of our own names (a
    hook point, a submodule for its output, "tokens", "positions", "logits") or, in `aliases`, it
    says which of them it is.
    """

    title: str
    run: Callable[[Int[Tensor, "batch pos"]], Mapping[str, Tensor]]
    aliases: Mapping[str, str] = field(default_factory=dict)


def _major_version() -> int:
    return int(version("transformer_lens").split(".")[0])


def _import(package: str, extra: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is installed, and something that it needs is not
            raise
        raise ReferenceUnavailable(f"{package} is not installed; install {extra}") from None
