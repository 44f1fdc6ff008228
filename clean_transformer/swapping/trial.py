"""Runs a new module once before a swap, to check that its output has the right shape."""

import math

import torch
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.hooks import hook_points
from clean_transformer.modules.contract import CONTRACT, kind
from clean_transformer.support.module_hooks import Placed, Reading
from clean_transformer.support.numerics import upcast
from clean_transformer.support.selection import PER_HEAD_INPUTS


class SwapError(ValueError):
    """A swap is not possible, for example because a module returns the wrong shape."""


@torch.no_grad()
def probe(
    module: nn.Module, name: str, path: str, cfg: Config, like: Tensor
) -> tuple[bool, list[str]]:
    """Run `module` on a batch of 2 inputs with 3 positions, and check its output.

    Returns whether the module looks ahead, and the full names of its hook points that do not run.

    `path` is the path that the module will have in the model, and `name` is the module's name in
    error messages. `like` is a tensor with the dtype and device of the model. Raises `SwapError` if
    the module raises an error, or if its output has the wrong shape, dtype or device.

    To find out whether the module looks ahead, it runs again with another input at the last
    position. The outputs at the earlier positions must not change by more than rounding:
    8 times the machine epsilon of their dtype, relative to their root mean square.
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
    other = given.clone()
    other[:, -1] = min(1, cfg.d_vocab - 1) if takes == "batch pos" else -2 * given[:, -1]
    # An attention runs the hook points for its scores only while they have hooks. `Ours.lost` looks
    # for the hook points in PER_HEAD_INPUTS, which a block runs only for some attentions.
    points = [
        (point, Reading(point_path, lambda activation, hook: None))
        for point_path, point in hook_points(module, path).items()
        if point_path.split(".")[-1] not in PER_HEAD_INPUTS
    ]
    try:
        output, again = _same_randomness(module, given), _same_randomness(module, other)
        with Placed(module, points):
            _same_randomness(module, other)
    except Exception as error:
        raise SwapError(f"{wanted} raised {type(error).__name__}: {error}") from error
    if not isinstance(output, Tensor) or not isinstance(again, Tensor):
        raise SwapError(f"{wanted} gave a {type(output).__name__}")
    if ([*output.shape], output.dtype, output.device) != (wanted_shape, like.dtype, like.device):
        raise SwapError(f"{wanted} gave {[*output.shape]}, {output.dtype} on {output.device}")
    before, after = upcast(output[:, :-1]), upcast(again[:, :-1])
    allowed = 8 * torch.finfo(output.dtype).eps * before.square().mean().sqrt()
    looks_ahead = bool((before - after).square().mean().sqrt() > allowed)
    return looks_ahead, [reading.name for _, reading in points if not reading.has_run]


def _same_randomness(module: nn.Module, given: Tensor) -> object:
    """Run `module`. Dropout draws the same numbers in each call, and later draws are unaffected."""
    with torch.random.fork_rng([given.device] if given.is_cuda else []):
        return module(given)
