"""Where the parts of GPT-2 are in a model of ours or of another library, and how to put one there.

A part is named by its path in ours: "embed", "blocks.3.attn", "ln_final" and so on.
"""

from collections.abc import Iterator, Mapping

from torch import nn

from clean_transformer.swapping.libraries.base import Ours
from clean_transformer.swapping.libraries.hooked_transformer import (
    FromLensAttention,
    FromLensBlock,
    FromLensPositions,
    _Lens,
)
from clean_transformer.swapping.libraries.huggingface import (
    FromHuggingFaceBlock,
    FromPositions,
    _HuggingFace,
)
from clean_transformer.swapping.libraries.transformer_bridge import _Bridge

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
