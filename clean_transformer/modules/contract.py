"""The shapes of the input and the output that each kind of module must have.

The parts of a model have paths: "embed", "blocks.3", "blocks.3.attn", "ln_final" and so on.
"""

import inspect
from collections.abc import Iterator

from torch import nn

# For each kind of module: the axes of its input and the axes of its output. swapping/README.md
# describes the whole contract, including the optional arguments.
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
    """The path of every part of a model with `n_layers` blocks, in forward-pass order."""
    yield from ("embed", "pos_embed")
    for layer in range(n_layers):
        yield f"blocks.{layer}"
        yield from (f"blocks.{layer}.{part}" for part in ("ln1", "attn", "ln2", "mlp"))
    yield from ("ln_final", "unembed")


def kind(path: str) -> str:
    """The kind of the module at a path. For "blocks.3" this is "block", a key of `CONTRACT`."""
    last = path.split(".")[-1]
    return "block" if last.isdigit() else last


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether `forward` of the module's class has an argument with the name `argument`."""
    return argument in inspect.signature(type(module).forward).parameters
