"""The `Library` for the models of this package."""

from typing import Any

from torch import nn

from clean_transformer.config import Config
from clean_transformer.hooks import PER_HEAD_INPUTS, hook_points
from clean_transformer.modules.contract import accepts, kind
from clean_transformer.swapping.libraries.base import Library, Place, place_at


class Ours(Library):
    """Supports `DemoTransformer`, and any `HookedModule` with a `cfg` and modules at our paths."""

    MODELS = ("clean_transformer.HookedModule",)

    def config(self, model: Any) -> Config:
        """Return the architecture of `model`."""
        return model.cfg

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        """Return one assignment, which puts `module` at the path `path` in `model`."""
        return [place_at(model, path, module)]

    def lost(self, model: Any, path: str, places: list[Place]) -> list[str]:
        """Return the full names of the old module's hook points that the new module lacks.

        A block has hook points for the inputs of each head, `PER_HEAD_INPUTS`. If the new module is
        an attention that does not take an input for each head, these hook points do not run, so the
        result also has their names.
        """
        [place] = places
        old, new = hook_points(model.get_submodule(path)), hook_points(place.module)
        lost = [f"{path}.{name}" for name in old if name not in new]
        if kind(path) == "attn" and not accepts(place.module, "key_input"):
            lost += [f"{path.removesuffix('attn')}{name}" for name in PER_HEAD_INPUTS]
        return lost
