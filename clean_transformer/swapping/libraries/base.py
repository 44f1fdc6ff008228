"""What `swap` and `transplant` need to know of a library: one subclass of `Library` each."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.config import Config

Residual = Float[Tensor, "batch pos d_model"]


class Adapter(nn.Module):
    """Wraps a module that is called by another convention than its own.

    Subclasses say how, in `forward`; `Adapter` itself calls the module as it is called. Other
    attributes, such as weights, are forwarded to the wrapped module.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **arguments: Any) -> Any:
        """What the module returns."""
        return self.module(*inputs, **arguments)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@dataclass(frozen=True)
class Place:
    """An attribute of a module, and the submodule to put there."""

    owner: nn.Module
    name: str
    module: nn.Module

    def put(self) -> "Place":
        """Put the submodule there. Returns the place with what was there before.

        The order among the owner's submodules stays.
        """
        before = Place(self.owner, self.name, self.owner._modules[self.name])  # type: ignore[arg-type]
        self.owner._modules[self.name] = self.module
        return before

    @property
    def is_put(self) -> bool:
        """Whether the submodule is there now."""
        return self.owner._modules[self.name] is self.module


class Library(ABC):
    """How to find and replace the parts of GPT-2 in the models of one library.

    Parts are named by our paths, such as "blocks.3.attn", in every library. Classes are named as
    "package.Class", so that no library has to be imported; subclasses count as their base classes.
    """

    # The classes of whole models.
    MODELS: tuple[str, ...]
    # For a kind of part and a class of this library: the adapter with which that is called as ours.
    AS_OURS: Mapping[tuple[str, str], type[Adapter]] = {}

    @abstractmethod
    def config(self, model: Any) -> Config:
        """The architecture of a model."""

    def find(self, model: Any, path: str) -> nn.Module | None:
        """The part at a path, or None if the model has none there."""
        try:
            return model.get_submodule(path)
        except AttributeError:
            return None

    @abstractmethod
    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        """What to put where, so that a module that is called as ours becomes the part at a path."""

    @abstractmethod
    def lost(self, model: Any, path: str, places: list[Place]) -> list[str]:
        """The full names of the hook points that no longer run once the places are put."""


def class_names(module: nn.Module) -> Iterator[str]:
    """A module's class and its base classes, each as "package.Class"."""
    for each in type(module).__mro__:
        yield f"{each.__module__.split('.')[0]}.{each.__name__}"


def place_at(root: nn.Module, path: str, module: nn.Module) -> Place:
    """The place of a module at a path below `root`."""
    owner, _, name = path.rpartition(".")
    return Place(root.get_submodule(owner), name, module)
