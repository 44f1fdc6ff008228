"""TODO swapping/libraries/transformer_bridge."""

import re
from collections.abc import Mapping
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.modules.contract import kind
from clean_transformer.swapping.libraries.base import Adapter, Ours, Place, _place
from clean_transformer.swapping.libraries.hooked_transformer import _Lens
from clean_transformer.swapping.libraries.huggingface import _HuggingFace

# TransformerLens from 4 on: Hugging Face's modules in shells that fire hook points.


class Bridged(Adapter):
    """A module between the hook points of the shell whose place it takes."""

    # `TransformerBridge` says here how many inputs a row of positions is for.
    _current_batch_size: int | None = None

    def __init__(self, module: nn.Module, before: list[nn.Module], after: list[nn.Module]):
        super().__init__(module)
        self.before, self.after = nn.ModuleList(before), nn.ModuleList(after)

    def forward(self, x: Tensor, *rest: Any, **arguments: Any) -> Any:
        """The module's output, or the first of its outputs, through the hook points."""
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
    """A hook point of theirs that sees the heads side by side, where ours have an axis."""

    def __init__(self, point: nn.Module):
        super().__init__()
        self.point = point

    def forward(
        self, activation: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """What their point makes of it."""
        merged = self.point(
            rearrange(activation, "batch pos head d_head -> batch pos (head d_head)")
        )
        return rearrange(
            merged, "batch pos (head d_head) -> batch pos head d_head", head=activation.shape[2]
        )


class _Bridge(_Lens):
    """`TransformerBridge` of transformer_lens 4: shells with hook points around Hugging Face's."""

    # The points of a part that see what comes in and what goes out, in this order.
    COMING_IN: Mapping[str, tuple[str, ...]] = {"mlp": ("hook_in", "in.hook_in")}
    GOING_OUT: Mapping[str, tuple[str, ...]] = {
        "mlp": ("out.hook_out", "hook_out"),
        "attn": ("o.hook_out", "hook_hidden_states", "hook_out"),
    }
    MERGED = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")

    def config(self, model: Any) -> Config:
        return _HuggingFace().config(model.original_model)

    def find(self, model: Any, path: str) -> nn.Module | None:
        return Ours.find(self, model.original_model, self.name(path))

    def name(self, path: str) -> str:
        """Hugging Face's name of our path. The parts of a block are behind its shell."""
        return re.sub(r"(\.h\.\d+)\.", r"\1._original_component.", _HuggingFace().name(path))

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        inner = _HuggingFace().adapted(path, module)
        points = [
            Place(owner, name, MergedHeads(theirs) if full.endswith(self.MERGED) else theirs)
            for (owner, name, theirs), full in self.shared_points(model, path, module)
        ]
        if kind(path) == "block":  # its shell stays, and fires its own points
            own = ("hook_resid_pre", "hook_resid_post")
            shell = self.find(model, path)
            kept = [place for place in points if place.name not in own]
            return [*kept, Place(shell, "_original_component", inner)]  # type: ignore[arg-type]
        at = self.points(model, path)
        shelled = Bridged(
            inner,
            [at[f"{path}.{name}"] for name in self.COMING_IN.get(kind(path), ("hook_in",))],
            [at[f"{path}.{name}"] for name in self.GOING_OUT.get(kind(path), ("hook_out",))],
        )
        # In Hugging Face's model, which runs, and in the bridge's own tree, which people look at.
        there = _place(model.original_model, self.name(path), shelled)
        return [*points, there, _place(model, path, shelled)]
