"""TODO swapping/libraries/base."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.hooks import HookPoint
from clean_transformer.modules.contract import PER_HEAD_INPUTS, kind, takes

Residual = Float[Tensor, "batch pos d_model"]


class Adapter(nn.Module):
    """A module that is called by another convention than its own.

    What it is asked for besides, such as weights, it asks of the module.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@dataclass(frozen=True)
class Place:
    """An attribute of a module, and the module that is to be there."""

    owner: nn.Module
    name: str
    module: nn.Module

    def put(self) -> "Place":
        """Put it there; gives what puts back what was there, in the same order among the others."""
        before = Place(self.owner, self.name, self.owner._modules[self.name])  # type: ignore[arg-type]
        self.owner._modules[self.name] = self.module
        return before

    @property
    def is_put(self) -> bool:
        """Whether it is there."""
        return self.owner._modules[self.name] is self.module


class Ours:
    """`DemoTransformer`, or another module of ours with a `cfg` and some of its parts."""

    def config(self, model: Any) -> Config:
        """The architecture."""
        return model.cfg

    def find(self, model: Any, path: str) -> nn.Module | None:
        """The part at a path of ours, or None if the model has none there."""
        try:
            return model.get_submodule(path)
        except AttributeError:
            return None

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        """Everything to put for the module to be that part."""
        return [_place(model, path, module)]

    def lost(self, model: Any, path: str, places: list[Place]) -> list[str]:
        """The hook points that nothing fires any more, by their full names."""
        [place] = places
        old, new = self.find(model, path), place.module
        kept = {name for name, _ in _hook_points(new)}
        lost = [f"{path}.{name}" for name, _ in _hook_points(old) if name not in kept]
        if kind(path) == "attn" and not takes(type(new).forward, "key_input"):
            lost += [f"{path.removesuffix('attn')}{name}" for name in PER_HEAD_INPUTS]
        return lost


def _place(root: nn.Module, path: str, module: nn.Module) -> Place:
    owner, _, name = path.rpartition(".")
    return Place(root.get_submodule(owner), name, module)


def _layer(path: str) -> int:
    return int(path.split(".")[1])


def _hook_points(module: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    named = module.named_modules() if module else ()
    return ((name, part) for name, part in named if isinstance(part, HookPoint))
