"""`Reference`: another implementation of GPT-2, which runs with our weights.

`hooked_transformer.py`, `huggingface.py` and `transformer_bridge.py` each add one implementation.
`choose.py` finds these files, and every new file in this folder that defines `IMPLEMENTATION`.
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

# Our names for the token ids and for the positions. Question 1 also compares these two inputs.
TOKENS, POSITIONS = "tokens", "positions"


class ReferenceUnavailable(RuntimeError):
    """The reference is not installed, or it does not support this model."""


@dataclass(frozen=True)
class Reference:
    """A model of another implementation, with our weights.

    `title` is the name of the implementation with its version. `run(tokens)` runs the model and
    returns a dict of all activations that the implementation caches. `run(tokens, keep)` returns
    only those for whose key `keep(key)` is true, to save memory. `aliases` maps a key of this
    dict to our name for the same activation. A key without an alias must be one of our names: a
    hook point, a submodule (for the submodule's output), TOKENS, POSITIONS or LOGITS.
    """

    title: str
    run: Callable[..., Mapping[str, Tensor]]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def name(self, key: str) -> str:
        """Our name for the activation that the implementation caches as `key`."""
        return self.aliases.get(key, key)


@dataclass(frozen=True)
class Implementation:
    """How to build a reference. A file of this folder defines it as `IMPLEMENTATION`.

    `build(cfg, state)` returns a `Reference` on the CPU with the parameters of `state`, in the
    dtype of these parameters. `build` raises `ReferenceUnavailable` if the needed package is not
    installed or does not support the model. `is_installed()` says whether the needed package is
    installed. The reference "auto" is the installed reference with the lowest `rank`.

    `read(folder)` returns a `Reference` in float64 on the CPU that has read the weights from the
    files of `folder` with the implementation's own code, not with our loader. Like our loader, it
    rounds the weights to float32. It raises `ReferenceUnavailable` if the implementation cannot
    read these files. `read` is None if the implementation has no loader.

    `model(cfg, state, device)` returns the implementation's model itself on `device`, with its
    default settings. It raises `ReferenceUnavailable` like `build`.
    """

    name: str
    build: Callable[[Config, State], Reference]
    model: Callable[[Config, State, torch.device], nn.Module]
    is_installed: Callable[[], bool]
    rank: int
    read: Callable[[Path], Reference] | None = None


def everything(key: str) -> bool:
    """Keep every activation (see `Reference`)."""
    return True


def major_version(package: str) -> int | None:
    """The major version of an installed package; None if the package is not installed."""
    try:
        return int(version(package).split(".")[0])
    except PackageNotFoundError:
        return None


def import_package(package: str, extra: str) -> Any:
    """Import a package and return its module.

    Raises `ReferenceUnavailable` if the package is not installed. The message names `extra`, the
    extra of clean-transformer that installs the package.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # the package is installed, but one of its dependencies is not
            raise
        message = f"{package} is not installed; install the extra {extra!r}"
        raise ReferenceUnavailable(message) from None
