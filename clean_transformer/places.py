"""Where the parts of GPT-2 are in a model of ours or of another library, and how to put one there.

A part is named by its path in ours: "embed", "blocks.3.attn", "ln_final" and so on.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from clean_transformer.config import Config
from clean_transformer.conventions import (
    Bridged,
    FromHuggingFaceBlock,
    FromLensAttention,
    FromLensBlock,
    FromLensPositions,
    FromPositions,
    HuggingFaceAttention,
    HuggingFaceBlock,
    HuggingFacePositions,
    LensAttention,
    LensBlock,
    LensPositions,
    MergedHeads,
)
from clean_transformer.hooks import HookPoint
from clean_transformer.kv_cache import takes
from clean_transformer.weights.huggingface import config_from_json

# What a block makes for attention only if that takes a stream for each.
PER_HEAD_INPUTS = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")


def parts(n_layers: int) -> Iterator[str]:
    """The path of every part of a model, in the order of the forward pass."""
    yield from ("embed", "pos_embed")
    for layer in range(n_layers):
        yield f"blocks.{layer}"
        yield from (f"blocks.{layer}.{part}" for part in ("ln1", "attn", "ln2", "mlp"))
    yield from ("ln_final", "unembed")


def kind(path: str) -> str:
    """What is at a path: "block", or the path's last word."""
    last = path.split(".")[-1]
    return "block" if last.isdigit() else last


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
        return [_place(model, path, as_ours(kind(path), module))]

    def lost(self, model: Any, path: str, places: list[Place]) -> list[str]:
        """The hook points that nothing fires any more, by their full names."""
        [place] = places
        old, new = self.find(model, path), place.module
        kept = {name for name, _ in _hook_points(new)}
        lost = [f"{path}.{name}" for name, _ in _hook_points(old) if name not in kept]
        if kind(path) == "attn" and not takes(type(new).forward, "key_input"):
            lost += [f"{path.removesuffix('attn')}{name}" for name in PER_HEAD_INPUTS]
        return lost


class _HuggingFace(Ours):
    """`GPT2LMHeadModel` of transformers. It has no hook points."""

    NAMES: Mapping[str, str] = {
        "embed": "transformer.wte",
        "pos_embed": "transformer.wpe",
        "blocks": "transformer.h",
        "ln1": "ln_1",
        "ln2": "ln_2",
        "ln_final": "transformer.ln_f",
        "unembed": "lm_head",
    }

    def config(self, model: Any) -> Config:
        return config_from_json(model.config.to_dict())

    def find(self, model: Any, path: str) -> nn.Module | None:
        return super().find(model, self.name(path))

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        return [_place(model, self.name(path), self.adapted(path, module))]

    def lost(self, model: Any, path: str, places: list[Place]) -> list[str]:
        return []

    def name(self, path: str) -> str:
        """Their name of our path."""
        return ".".join(self.NAMES.get(word, word) for word in path.split("."))

    def adapted(self, path: str, module: nn.Module) -> nn.Module:
        """The module, called as theirs of that path."""
        match kind(path):
            case "pos_embed":
                return HuggingFacePositions(module)
            case "attn":
                return HuggingFaceAttention(module, _layer(path))
            case "block":
                return HuggingFaceBlock(module, _layer(path))
        return module


class _Lens(Ours):
    """`HookedTransformer` of transformer_lens before 4. Its hook points take the place of ours.

    Except those that it fires only when it is configured to: it hooks them all for a cache, and
    ours would compute for each head what nobody asked for.
    """

    OPTIONAL: Mapping[str, str] = {
        "hook_attn_in": "use_attn_in",
        "hook_q_input": "use_split_qkv_input",
        "hook_k_input": "use_split_qkv_input",
        "hook_v_input": "use_split_qkv_input",
        "hook_result": "use_attn_result",
    }

    ADAPTERS: Mapping[str, Any] = {
        "attn": LensAttention,
        "block": LensBlock,
        "pos_embed": LensPositions,
    }

    def config(self, model: Any) -> Config:
        return Config(
            **{
                axis: getattr(model.cfg, axis) for axis in ("d_model", "d_head", "d_mlp", "d_vocab")
            },
            **{name: getattr(model.cfg, name) for name in ("n_layers", "n_heads", "n_ctx", "eps")},
            normalization_type=model.cfg.normalization_type,
            tied_unembed=False,
        )

    def places(self, model: Any, path: str, module: nn.Module) -> list[Place]:
        adapter = self.ADAPTERS.get(kind(path))
        adapted = adapter(module) if adapter else module
        points = [Place(*point) for point, _ in self.shared_points(model, path, module)]
        return [*points, _place(model, path, adapted)]

    def lost(self, model: Any, path: str, places: list[Place]) -> list[str]:
        fired = {id(part) for place in places for part in place.module.modules()}
        fired |= {id(part) for place in places for part in place.owner.children()}
        return [name for name, point in self.points(model, path).items() if id(point) not in fired]

    def points(self, model: Any, path: str) -> dict[str, nn.Module]:
        """The hook points of a part that fire, by their full names."""

        def fires(name: str) -> bool:
            flag = self.OPTIONAL.get(name.split(".")[-1])
            return getattr(model.cfg, flag, False) if flag else ".qkv." not in name

        return {
            name: point
            for name, point in model.hook_dict.items()
            if name.startswith(f"{path}.") and fires(name)
        }

    def shared_points(
        self, model: Any, path: str, module: nn.Module
    ) -> Iterator[tuple[tuple[nn.Module, str, nn.Module], str]]:
        """Where the module has a point of the same name as theirs: its owner, its name there and
        theirs; and the full name."""
        theirs = self.points(model, path)
        for below, _ in _hook_points(module):
            full = f"{path}.{below}"
            if full in theirs:
                owner, _, name = below.rpartition(".")
                yield (module.get_submodule(owner), name, theirs[full]), full


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


LIBRARIES: Mapping[str, Ours] = {
    "transformers.GPT2LMHeadModel": _HuggingFace(),
    "transformer_lens.HookedTransformer": _Lens(),
    "transformer_lens.TransformerBridge": _Bridge(),
    "clean_transformer.HookedModule": Ours(),
}

# What has another convention than ours, by its class or one that it derives from.
FROM_THEIRS: Mapping[str, type[nn.Module]] = {
    "transformers.GPT2Attention": FromHuggingFaceBlock,
    "transformers.GPT2Block": FromHuggingFaceBlock,
    "transformer_lens.AttentionBridge": FromHuggingFaceBlock,
    "transformer_lens.BlockBridge": FromHuggingFaceBlock,
    "transformer_lens.PosEmbedBridge": FromPositions,
    "transformer_lens.AbstractAttention": FromLensAttention,
    "transformer_lens.TransformerBlock": FromLensBlock,
    "transformer_lens.PosEmbed": FromLensPositions,
}


def library(model: nn.Module) -> Ours | None:
    """How to deal with a whole model; None if it is none that is known."""
    return next((LIBRARIES[name] for name in _class_names(model) if name in LIBRARIES), None)


def as_ours(kind: str, module: nn.Module) -> nn.Module:
    """The module, called as ours, whichever library it is from."""
    if kind == "pos_embed" and isinstance(module, nn.Embedding):
        return FromPositions(module)
    for name in _class_names(module):
        if name in FROM_THEIRS:
            return FROM_THEIRS[name](module)
    return module


def _class_names(module: nn.Module) -> Iterator[str]:
    """The classes that it is of, each as package.Class, so that none has to be imported."""
    for each in type(module).__mro__:
        yield f"{each.__module__.split('.')[0]}.{each.__name__}"


def _layer(path: str) -> int:
    return int(path.split(".")[1])


def _place(root: nn.Module, path: str, module: nn.Module) -> Place:
    owner, _, name = path.rpartition(".")
    return Place(root.get_submodule(owner), name, module)


def _hook_points(module: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    named = module.named_modules() if module else ()
    return ((name, part) for name, part in named if isinstance(part, HookPoint))
