"""`Library` for TransformerLens 4 and later.

Its modules are shells: they add hook points around Hugging Face's modules.
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
from clean_transformer.swapping.libraries.base import Adapter, Library, Place, place_at
from clean_transformer.swapping.libraries.hooked_transformer import Lens
from clean_transformer.swapping.libraries.huggingface import FromBlock, FromPositions, HuggingFace


class Bridged(Adapter):
    """Our module in place of a shell. Input and output pass through the shell's hook points."""

    # `TransformerBridge` sets this for position embeddings, because Hugging Face computes them
    # with batch size 1.
    _current_batch_size: int | None = None

    def __init__(self, module: nn.Module, before: list[nn.Module], after: list[nn.Module]):
        super().__init__(module)
        self.before, self.after = nn.ModuleList(before), nn.ModuleList(after)

    def forward(self, x: Tensor, *rest: Any, **arguments: Any) -> Any:
        """The module's output. If it is a tuple, only its first element passes the hook points."""
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
    """Replaces our hook point by TransformerLens's hook point, which has no head axis.

    TransformerLens's hook point gets [batch pos (head d_head)].
    """

    def __init__(self, point: nn.Module):
        super().__init__()
        self.point = point

    def forward(
        self, activation: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """The activation that TransformerLens's hook point returns, with the head axis restored."""
        merged = self.point(
            rearrange(activation, "batch pos head d_head -> batch pos (head d_head)")
        )
        return rearrange(
            merged, "batch pos (head d_head) -> batch pos head d_head", head=activation.shape[2]
        )


class FromShell(FromBlock):
    """Gives a shell around a `GPT2Block` or `GPT2Attention` our call signature."""

    def cache_name(self) -> str:
        """The name of the shell's argument for the cache, in every version of transformers."""
        return "layer_past"


class Bridge(Lens):
    """Supports `TransformerBridge`. Its hook points replace ours in a transplanted module."""

    MODELS = ("transformer_lens.TransformerBridge",)
    AS_OURS: Mapping[tuple[str, str], type[Adapter]] = {
        ("attn", "transformer_lens.AttentionBridge"): FromShell,
        ("block", "transformer_lens.BlockBridge"): FromShell,
        ("pos_embed", "transformer_lens.PosEmbedBridge"): FromPositions,
    }
    # For each kind of part, the shell's hook points that get the input (INPUT) or the output
    # (OUTPUT), in the order of the forward pass. The default is hook_in or hook_out.
    INPUT: Mapping[str, tuple[str, ...]] = {"mlp": ("hook_in", "in.hook_in")}
    OUTPUT: Mapping[str, tuple[str, ...]] = {
        "mlp": ("out.hook_out", "hook_out"),
        "attn": ("o.hook_out", "hook_hidden_states", "hook_out"),
    }
    MERGED_HEADS = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")

    inside = HuggingFace()

    def config(self, model: Any) -> Config:
        """The architecture of a model."""
        return self.inside.config(model.original_model)

    def find(self, model: Any, path: str) -> nn.Module | None:
        """The module at our path `path`, or None if the model has no such module."""
        return Library.find(self, model.original_model, self.name(path))

    def name(self, path: str) -> str:
        """The path of a part in Hugging Face's model, where a shell wraps each block."""
        return re.sub(r"(\.h\.\d+)\.", r"\1._original_component.", self.inside.name(path))

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        """Assignments that put the old hook points into `module`, and `module` into the model.

        `module` is put into Hugging Face's model and into the bridge.
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
        # Hugging Face's model computes. The bridge has a separate module tree, which users inspect.
        there = place_at(model.original_model, self.name(path), shelled)
        return [*points, there, place_at(model, path, shelled)]
