"""`Reference`: another implementation of GPT-2, which runs with our weights.

Each file of this folder that defines `IMPLEMENTATION` adds one implementation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.analysis.comparison import LOGITS as LOGITS
from clean_transformer.config import Config
from clean_transformer.weights.table import State

# Our names for the token ids and for the positions. `same_function.py` also compares these inputs.
TOKENS, POSITIONS = "tokens", "positions"


class ReferenceUnavailable(RuntimeError):
    """A GPT-2 implementation is not installed, cannot run a model, or cannot read the weights."""


@dataclass(frozen=True)
class Reference:
    """A GPT-2 model of another implementation, such as Hugging Face's, with our weights.

    `title` is the name of the implementation with its version. `run(tokens)` runs the model, and
    returns a dict of all activations that the implementation caches. `run(tokens, keep)` returns
    only the activations for which `keep(key)` is true, to save memory. `aliases` maps a key of this
    dict to our name for the same activation. If `aliases` does not have a key, the key is already
    our name: a hook point, a submodule (for the submodule's output), TOKENS, POSITIONS or LOGITS.
    """

    title: str
    run: Callable[..., Mapping[str, Tensor]]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def name(self, key: str) -> str:
        """Our name for the activation that the implementation caches as `key`."""
        return self.aliases.get(key, key)


@dataclass(frozen=True)
class Implementation:
    """How to build a `Reference`: a model of another implementation of GPT-2, with our weights.

    `name` is the name by which a user chooses the implementation, such as "huggingface". If the
    user chooses "auto", the installed implementation with the lowest `rank` is used.
    `is_installed()` says whether the package of the implementation is installed.

    `build(cfg, state)` returns a `Reference` on the CPU with the parameters of the state dict
    `state`, in their dtype. `model(cfg, state, device)` returns the implementation's model itself
    on `device`, with its default settings. Both raise `ReferenceUnavailable` if the package is not
    installed, or does not support the model.

    `read(folder)` returns a `Reference` in float64 on the CPU. The implementation's own code reads
    the weights from the files of `folder`, not our loader. The weights are rounded to float32, as
    in our loader. `read` raises `ReferenceUnavailable` if the implementation cannot read these
    files. `read` is None if the implementation has no loader.
    """

    name: str
    build: Callable[[Config, State], Reference]
    model: Callable[[Config, State, torch.device], nn.Module]
    is_installed: Callable[[], bool]
    rank: int
    read: Callable[[Path], Reference] | None = None


def everything(key: str) -> bool:
    """Return True for every key, so that `Reference.run` returns all activations."""
    return True


def major_version(package: str) -> int | None:
    """The major version of an installed package; None if the package is not installed."""
    try:
        return int(version(package).split(".")[0])
    except PackageNotFoundError:
        return None


def import_package(package: str, extra: str) -> Any:
    """Import a package and return its module.

    Raises `ReferenceUnavailable` if the package is not installed. The message names `extra`,
    the group of optional dependencies of clean-transformer that contains the package.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # the package is installed, but one of its dependencies is not
            raise
        message = f"{package} is not installed; install the extra {extra!r}"
        raise ReferenceUnavailable(message) from None
