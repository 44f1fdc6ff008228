"""Defines `Library`, the base class for finding and replacing modules in one library's models."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.weights.shapes import parameter_shapes
from clean_transformer.weights.table import Format, State

Residual = Float[Tensor, "batch pos d_model"]


class Adapter(nn.Module):
    """Wraps a module to give it a different call signature.

    Subclasses convert the arguments and the output in `forward`. `Adapter` itself converts nothing.
    Attributes that the adapter does not have, such as weights, are those of the wrapped module.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **arguments: Any) -> Any:
        """Return the output of the wrapped module."""
        return self.module(*inputs, **arguments)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@dataclass(frozen=True)
class Place:
    """Says where to put a module: `put` makes `module` the submodule called `name` of `owner`."""

    owner: nn.Module
    name: str
    module: nn.Module

    def put(self) -> "Place":
        """Put the module in its place. Return a `Place` whose `put` brings back the old module."""
        before = Place(self.owner, self.name, self.owner._modules[self.name])  # type: ignore[arg-type]
        self.owner._modules[self.name] = self.module
        return before

    @property
    def is_put(self) -> bool:
        """Whether `module` is now the submodule called `name` of `owner`."""
        return self.owner._modules[self.name] is self.module


class Library(ABC):
    """Finds and replaces modules in the GPT-2 models of one library.

    In all methods, `path` is the module's path in this package's models, such as "blocks.3.attn",
    even if the module has another path in the library's models.
    """

    # A class is named by the string "package.Class", so that this package need not import the
    # library. The name of a class also stands for its subclasses.
    # The class names of the library's whole models.
    MODELS: tuple[str, ...]
    # The keys are (kind of module, class name in the library); `CONTRACT` has the kinds. Each value
    # is the adapter that gives modules of this class our call signature.
    AS_OURS: Mapping[tuple[str, str], type[Adapter]] = {}

    @abstractmethod
    def config(self, model: Any) -> Config:
        """Return the architecture of `model`."""

    def weights(self, model: Any, path: str) -> dict[str, Tensor]:
        """Return the weights of the module at `path`, by this package's names, such as "W_Q".

        Weights that the module itself has as attributes with these names can be left out.
        """
        return {}

    def find(self, model: Any, path: str) -> nn.Module | None:
        """Return the module at `path`, or None if `model` has no such module."""
        try:
            return model.get_submodule(path)
        except AttributeError:
            return None

    @abstractmethod
    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        """Return the changes that let `model` use `module` at `path`, without making them yet.

        Each `Place` replaces one submodule. `module` has the call signature of this package's
        modules.
        """

    @abstractmethod
    def lost(self, model: Any, path: str, places: list[Place], idle: Collection[str]) -> list[str]:
        """Return the full names of the old hook points that do not run with the new module.

        `places` has the steps that put the new module at `path`. `idle` has the full names of hook
        points that the new module has, and does not run.
        """


def read_part(known: Format, cfg: Config, state: State, path: str) -> dict[str, Tensor]:
    """Return the weights of one module, by this package's names, such as "W_Q".

    `path` is the path of the module in this package's models, such as "blocks.3.attn". `state` is
    the state dict of a whole model, in the format `known`. The result has no weights that `state`
    lacks, and zeros for weights that the format does not store.
    """
    rows = [row for row in known.all_rows(cfg.n_layers) if row.ours.startswith(f"{path}.")]
    weights = {
        row.ours: row.read(state[row.theirs], cfg)
        for row in rows
        if row.theirs is not None and row.theirs in state
    }
    if weights:  # then the part is still a module of the library, and not one of ours
        like, shapes = next(iter(weights.values())), parameter_shapes(cfg)
        weights |= {row.ours: like.new_zeros(shapes[row.ours]) for row in rows if not row.theirs}
    return {name.removeprefix(f"{path}."): weight for name, weight in weights.items()}


def class_names(module: nn.Module) -> Iterator[str]:
    """Yield the name of a module's class and of each base class, in the form "package.Class"."""
    for each in type(module).__mro__:
        yield f"{each.__module__.split('.')[0]}.{each.__name__}"


def place_at(root: nn.Module, path: str, module: nn.Module) -> Place:
    """Return the `Place` that puts `module` at the path `path` inside `root`."""
    owner, _, name = path.rpartition(".")
    return Place(root.get_submodule(owner), name, module)
