"""What each kind of module must take and give.

A part of a model is named by its path: "embed", "blocks.3", "blocks.3.attn", "ln_final" and so on.
"""

import inspect
from collections.abc import Iterator

from torch import nn

# What each kind of module takes and gives, as the axes of one tensor. swapping/README.md has the
# whole contract, with the arguments that a module can leave out.
CONTRACT = {
    "embed": ("batch pos", "batch pos d_model"),
    "pos_embed": ("batch pos", "batch pos d_model"),
    "block": ("batch pos d_model", "batch pos d_model"),
    "ln1": ("batch pos d_model", "batch pos d_model"),
    "attn": ("batch pos d_model", "batch pos d_model"),
    "ln2": ("batch pos d_model", "batch pos d_model"),
    "mlp": ("batch pos d_model", "batch pos d_model"),
    "ln_final": ("batch pos d_model", "batch pos d_model"),
    "unembed": ("batch pos d_model", "batch pos d_vocab"),
}


def parts(n_layers: int) -> Iterator[str]:
    """The path of every part of a model, in the order of the forward pass."""
    yield from ("embed", "pos_embed")
    for layer in range(n_layers):
        yield f"blocks.{layer}"
        yield from (f"blocks.{layer}.{part}" for part in ("ln1", "attn", "ln2", "mlp"))
    yield from ("ln_final", "unembed")


def kind(path: str) -> str:
    """The kind of the module at a path, a key of `CONTRACT`: "blocks.3" is a "block"."""
    last = path.split(".")[-1]
    return "block" if last.isdigit() else last


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether the `forward` of the module's class has an argument of that name."""
    return argument in inspect.signature(type(module).forward).parameters
