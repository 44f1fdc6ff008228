"""What each kind of module must take and give, and a trial run that checks it.

A part of a model is named by its path: "embed", "blocks.3", "blocks.3.attn", "ln_final" and so on.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from clean_transformer.config import Config

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


class SwapError(ValueError):
    """A pattern that matches no path, or a module that does not keep the contract."""


@torch.no_grad()
def probe(module: nn.Module, name: str, path: str, cfg: Config, like: Tensor) -> None:
    """Run the module once on a batch of 2 inputs with 3 positions.

    `name` is what the error calls the module. `like` is a tensor of the model's dtype and device.
    Raises `SwapError` if the module cannot be called, or gives another shape, dtype or device than
    `CONTRACT` says.
    """
    takes, gives = CONTRACT[kind(path)]
    lengths = cfg.axes() | {"batch": 2, "pos": min(3, cfg.n_ctx)}
    given_shape, wanted_shape = (
        [lengths[axis] for axis in axes.split()] for axes in (takes, gives)
    )
    if takes == "batch pos":
        given = torch.zeros(given_shape, dtype=torch.int64, device=like.device)
    else:
        given = torch.linspace(-1, 1, math.prod(given_shape), device=like.device).to(like.dtype)
        given = given.reshape(given_shape)
    wanted = (
        f"{path}: {name}, given {takes!r} {given_shape}: "
        f"wanted {gives!r} {wanted_shape}, {like.dtype} on {like.device}, but it"
    )
    try:
        with torch.random.fork_rng(devices=[]):  # dropout must not change later random numbers
            output = module(given)
    except Exception as error:
        raise SwapError(f"{wanted} raised {type(error).__name__}: {error}") from error
    if not isinstance(output, Tensor):
        raise SwapError(f"{wanted} gave a {type(output).__name__}")
    if ([*output.shape], output.dtype, output.device) != (wanted_shape, like.dtype, like.device):
        raise SwapError(f"{wanted} gave {[*output.shape]}, {output.dtype} on {output.device}")
