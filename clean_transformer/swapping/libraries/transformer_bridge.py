"""Finds and replaces modules in a `TransformerBridge`, the model of TransformerLens 4 and later.

A `TransformerBridge` contains a model of Hugging Face. Each module of the bridge is a shell around
a module of Hugging Face: the shell calls the inner module, and adds hook points for the inner
module's input and output.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.modules.contract import kind
from clean_transformer.swapping.libraries.base import (
    Adapter,
    Library,
    Place,
    place_at,
    read_part,
)
from clean_transformer.swapping.libraries.hooked_transformer import Lens
from clean_transformer.swapping.libraries.huggingface import FromBlock, FromPositions, HuggingFace
from clean_transformer.weights.formats.transformer_lens import TRANSFORMER_BRIDGE


class Bridged(Adapter):
    """Wraps one of our modules, and replaces a module of a `TransformerBridge`.

    `before` and `after` are hook points of the replaced module. The input passes through all hook
    points in `before`, and the output through all hook points in `after`.
    """

    # `TransformerBridge` sets this attribute on the position embedding. Hugging Face computes
    # position embeddings with batch size 1, but the hook points get the batch size of the tokens.
    _current_batch_size: int | None = None

    def __init__(self, module: nn.Module, before: list[nn.Module], after: list[nn.Module]):
        super().__init__(module)
        self.before, self.after = nn.ModuleList(before), nn.ModuleList(after)

    def forward(self, x: Tensor, *rest: Any, **arguments: Any) -> Any:
        """Return the module's output. Of a tuple, only the first item passes through `after`."""
        for point in self.before:
            x = point(x)
        output = self.module(x, *rest, **arguments)
        first, others = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if self._current_batch_size is not None:
            first = first.expand(self._current_batch_size, -1, -1)
        for point in self.after:
            first = point(first)
        return first if others is None else (first, *others)


class MergedHeads(nn.Module):
    """Replaces one of our hook points, and calls TransformerLens's hook point `point` instead.

    The activation has the shape [batch pos head d_head] at our hook point, and
    [batch pos (head d_head)] at `point`.
    """

    def __init__(self, point: nn.Module):
        super().__init__()
        self.point = point

    def forward(
        self, activation: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return the output of `point` in the shape of `activation`."""
        merged = self.point(
            rearrange(activation, "batch pos head d_head -> batch pos (head d_head)")
        )
        return rearrange(
            merged, "batch pos (head d_head) -> batch pos head d_head", head=activation.shape[2]
        )


class FromShell(FromBlock):
    """Wraps a `BlockBridge` or `AttentionBridge`, so that our model can call it like our module."""

    def cache_name(self) -> str:
        """Return the name of the module's cache argument."""
        return "layer_past"


class Bridge(Lens):
    """Finds and replaces modules in a `TransformerBridge`.

    When `transplant` replaces a module, the old module's hook points replace the hook points with
    the same names in the new module.
    """

    MODELS = ("transformer_lens.TransformerBridge",)
    AS_OURS: Mapping[tuple[str, str], type[Adapter]] = {
        ("attn", "transformer_lens.AttentionBridge"): FromShell,
        ("block", "transformer_lens.BlockBridge"): FromShell,
        ("pos_embed", "transformer_lens.PosEmbedBridge"): FromPositions,
    }
    # For each kind of module, the shell's hook points that get the module's input (INPUT) or output
    # (OUTPUT), in the order of the forward pass. Shells of other kinds have hook_in and hook_out.
    INPUT: Mapping[str, tuple[str, ...]] = {"mlp": ("hook_in", "in.hook_in")}
    OUTPUT: Mapping[str, tuple[str, ...]] = {
        "mlp": ("out.hook_out", "hook_out"),
        "attn": ("o.hook_out", "hook_hidden_states", "hook_out"),
    }
    MERGED_HEADS = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")

    inside = HuggingFace()

    def config(self, model: Any) -> Config:
        """Return the architecture of `model`."""
        return self.inside.config(model.original_model)

    def find(self, model: Any, path: str) -> nn.Module | None:
        """Return the module at `path`, or None if `model` has no such module."""
        return Library.find(self, model.original_model, self.name(path))

    def weights(self, model: Any, path: str) -> dict[str, Tensor]:
        """Return the weights of the module at `path`, by this package's names, such as "W_Q"."""
        return read_part(TRANSFORMER_BRIDGE, self.config(model), model.state_dict(), path)

    def name(self, path: str) -> str:
        """Return the path in `model.original_model` for `path`, a path in this package's models."""
        # The bridge wraps each block of this model, a model of Hugging Face. The block itself is
        # the attribute `_original_component` of the wrapper.
        return re.sub(r"(\.h\.\d+)\.", r"\1._original_component.", self.inside.name(path))

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        """Return the steps, one `Place` each, that put `module` at `path` in `model`.

        The first steps put the old module's hook points into `module`. The last steps put `module`
        into the bridge, and into the model of Hugging Face inside the bridge.
        """
        inner = self.inside.as_theirs(path, module)
        points = [
            replace(place, module=MergedHeads(place.module))
            if full.endswith(self.MERGED_HEADS)
            else place
            for place, full in self.shared_points(model, path, module)
        ]
        if kind(path) == "block":  # the block's shell stays in place, with its own hook points
            own = ("hook_resid_pre", "hook_resid_post")
            shell = self.find(model, path)
            kept = [place for place in points if place.name not in own]
            return [*kept, Place(shell, "_original_component", inner)]  # type: ignore[arg-type]
        at = self.points(model, path)
        shelled = Bridged(
            inner,
            [at[f"{path}.{name}"] for name in self.INPUT.get(kind(path), ("hook_in",))],
            [at[f"{path}.{name}"] for name in self.OUTPUT.get(kind(path), ("hook_out",))],
        )
        # The forward pass runs the modules of Hugging Face's model. Users inspect the module tree
        # of the bridge. So the new module is put into both.
        there = place_at(model.original_model, self.name(path), shelled)
        return [*points, there, place_at(model, path, shelled)]
