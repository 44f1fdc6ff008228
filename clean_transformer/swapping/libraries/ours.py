"""Finds and replaces modules in the models of this package."""

from collections.abc import Collection
from typing import Any

from torch import nn

from clean_transformer.config import Config
from clean_transformer.hooks import hook_points
from clean_transformer.modules.contract import accepts, kind
from clean_transformer.support.selection import PER_HEAD_INPUTS
from clean_transformer.swapping.libraries.base import Library, Place, place_at


class Ours(Library):
    """Finds and replaces modules in a `DemoTransformer`, or in a similar model.

    A similar model is a `HookedModule` that has a `cfg`, and modules at the same paths.
    """

    MODELS = ("clean_transformer.HookedModule",)

    def config(self, model: Any) -> Config:
        """Return the architecture of `model`."""
        return model.cfg

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        """Return a list with one step, which puts `module` at `path` in `model`."""
        return [place_at(model, path, module)]

    def lost(self, model: Any, path: str, places: list[Place], idle: Collection[str]) -> list[str]:
        """Return the full names of the old module's hook points that the new module does not run.

        `idle` has the full names of hook points that the new module has, and does not run.

        A block has hook points for separate inputs of each head, such as `hook_q_input`. If the new
        module is an attention that takes one input for all heads, these hook points do not run, and
        the result has their names, too.
        """
        [place] = places
        old = hook_points(model.get_submodule(path), path)
        run = hook_points(place.module, path).keys() - {*idle}
        lost = [name for name in old if name not in run]
        if kind(path) == "attn" and not accepts(place.module, "key_input"):
            lost += [f"{path.removesuffix('attn')}{name}" for name in PER_HEAD_INPUTS]
        return lost
