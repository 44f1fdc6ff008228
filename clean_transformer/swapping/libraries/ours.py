"""Our own models."""

from typing import Any

from torch import nn

from clean_transformer.config import Config
from clean_transformer.hooks import PER_HEAD_INPUTS, hook_points
from clean_transformer.modules.contract import accepts, kind
from clean_transformer.swapping.libraries.base import Library, Place, place_at


class Ours(Library):
    """`DemoTransformer`, or another `HookedModule` with a `cfg` and some of its parts."""

    MODELS = ("clean_transformer.HookedModule",)

    def config(self, model: Any) -> Config:
        """The architecture of a model."""
        return model.cfg

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        """The path itself."""
        return [place_at(model, path, module)]

    def lost(self, model: Any, path: str, places: list[Place]) -> list[str]:
        """The hook points of the old module that the new one lacks.

        Attention that takes no inputs per head also loses the block's hook points of those.
        """
        [place] = places
        old, new = hook_points(model.get_submodule(path)), hook_points(place.module)
        lost = [f"{path}.{name}" for name in old if name not in new]
        if kind(path) == "attn" and not accepts(place.module, "key_input"):
            lost += [f"{path.removesuffix('attn')}{name}" for name in PER_HEAD_INPUTS]
        return lost
