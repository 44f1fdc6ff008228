"""Runs a new module once before a swap, to check that its output has the right shape."""

import math

import torch
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.modules.contract import CONTRACT, kind


class SwapError(ValueError):
    """A swap is not possible, for example because a module returns the wrong shape."""


@torch.no_grad()
def probe(module: nn.Module, name: str, path: str, cfg: Config, like: Tensor) -> None:
    """Run `module` once, on a batch of 2 inputs with 3 positions, and check its output.

    `path` is the path that the module will have in the model, and `name` is the module's name in
    error messages. `like` is a tensor with the dtype and device of the model. Raises `SwapError` if
    the module raises an error, or if its output has the wrong shape, dtype or device.
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
