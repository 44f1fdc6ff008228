"""The contract of each kind of module: the shapes of its input and its output.

In this package, a part of a model is a module of one of these kinds. Each part has a path in the
model, such as "embed", "blocks.3", "blocks.3.attn" or "ln_final".
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
    """Yield the path of every part of a model with `n_layers` blocks, in forward-pass order."""
    yield from ("embed", "pos_embed")
    for layer in range(n_layers):
        yield f"blocks.{layer}"
        yield from (f"blocks.{layer}.{part}" for part in ("ln1", "attn", "ln2", "mlp"))
    yield from ("ln_final", "unembed")


def kind(path: str) -> str:
    """Return the kind of the module at `path`, a key of `CONTRACT`: "block" for "blocks.3"."""
    last = path.split(".")[-1]
    return "block" if last.isdigit() else last


def accepts(module: nn.Module, argument: str) -> bool:
    """Return whether the `forward` of the module's class has an argument named `argument`."""
    return argument in inspect.signature(type(module).forward).parameters
