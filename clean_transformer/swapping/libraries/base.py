"""`Library`, the base class that tells `swap` and `transplant` about one library's models."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.config import Config

Residual = Float[Tensor, "batch pos d_model"]


class Adapter(nn.Module):
    """Wraps a module to give it a different call signature.

    Subclasses convert the arguments and the output in `forward`. `Adapter` itself converts nothing.
    Other attributes, such as weights, are forwarded to the wrapped module.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **arguments: Any) -> Any:
        """The output of the wrapped module."""
        return self.module(*inputs, **arguments)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@dataclass(frozen=True)
class Place:
    """An attribute of a module, and a new value for it: `owner.name` is to become `module`."""

    owner: nn.Module
    name: str
    module: nn.Module

    def put(self) -> "Place":
        """Assign the submodule to the attribute. Returns a `Place` with the previous submodule.

        The order of the owner's submodules does not change.
        """
        before = Place(self.owner, self.name, self.owner._modules[self.name])  # type: ignore[arg-type]
        self.owner._modules[self.name] = self.module
        return before

    @property
    def is_put(self) -> bool:
        """Whether the attribute currently holds the submodule."""
        return self.owner._modules[self.name] is self.module


class Library(ABC):
    """Finds and replaces the parts of GPT-2 in the models of one library.

    For every library, `path` is our path of a part, such as "blocks.3.attn". Classes are given as
    strings "package.Class", so that the library need not be imported. A class name also matches all
    subclasses.
    """

    # The class names of whole models.
    MODELS: tuple[str, ...]
    # (kind of part, class name of this library) → the adapter that gives modules of the class our
    # call signature.
    AS_OURS: Mapping[tuple[str, str], type[Adapter]] = {}

    @abstractmethod
    def config(self, model: Any) -> Config:
        """The architecture of a model."""

    def find(self, model: Any, path: str) -> nn.Module | None:
        """The module at our path `path`, or None if the model has no such module."""
        try:
            return model.get_submodule(path)
        except AttributeError:
            return None

    @abstractmethod
    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        """The assignments that put `module`, which has our call signature, at our path `path`."""

    @abstractmethod
    def lost(self, model: Any, path: str, places: list[Place]) -> list[str]:
        """The full names of the hook points that do not run after the assignments in `places`."""


def class_names(module: nn.Module) -> Iterator[str]:
    """The names "package.Class" of a module's class and of all its base classes."""
    for each in type(module).__mro__:
        yield f"{each.__module__.split('.')[0]}.{each.__name__}"


def place_at(root: nn.Module, path: str, module: nn.Module) -> Place:
    """The `Place` that puts `module` at the path `path` inside `root`."""
    owner, _, name = path.rpartition(".")
    return Place(root.get_submodule(owner), name, module)
