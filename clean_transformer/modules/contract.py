"""TODO modules/contract."""

import inspect
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.kv_cache import LayerCache


def call_with_cache(
    module: nn.Module, inputs: tuple[Tensor, ...], kv_cache: LayerCache | None
) -> Any:
    """What `module` makes of new positions, where those before them are in `kv_cache`.

    A module that takes no `kv_cache` is run on all its inputs so far, which are kept in the place
    of keys and values: slower, and the same for whatever it computes.
    """
    if kv_cache is None:
        return module(*inputs)
    if takes(type(module).forward, "kv_cache"):
        return module(*inputs, kv_cache=kv_cache)
    x = inputs[0]
    so_far = kv_cache.append(x[:, :, None], x[:, :, None])[0].squeeze(2)
    mask = kv_cache.mask(x.shape[1])
    if mask is None:
        return module(so_far)[:, -x.shape[1] :]
    # It knows nothing of padding either: each input goes by itself, without its own.
    output = torch.zeros_like(x)
    for row, is_token in enumerate(mask[:, 0, -1].expand(len(x), -1)):
        new = module(so_far[row, is_token][None])[0, -x.shape[1] :]
        output[row, x.shape[1] - len(new) :] = new
    return output


def embed_positions(
    pos_embed: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    positions: Int[Tensor, "batch pos"] | None,
) -> Float[Tensor, "batch pos d_model"]:
    """What `pos_embed` adds to the tokens at those positions; None is from 0 on.

    A module that takes no `positions` is asked for every position from 0 on.
    """
    if positions is None:
        return pos_embed(tokens)
    if takes(type(pos_embed).forward, "positions"):
        return pos_embed(tokens, positions)
    from_the_first = tokens.new_zeros(1, int(positions.max()) + 1)
    return pos_embed(from_the_first)[0, positions]


@lru_cache
def takes(forward: Any, argument: str) -> bool:
    """Whether a `forward` has an argument of that name."""
    return argument in inspect.signature(forward).parameters


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


# What each kind of module receives and returns, as axes; README.md has it with words.
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


@torch.no_grad()
def probe(module: nn.Module, name: str, path: str, cfg: Config, like: Tensor) -> None:
    """Try the module on a tiny batch. Raises `SwapError` unless it keeps the contract."""
    lengths = cfg.axes() | {"batch": 2, "pos": min(3, cfg.n_ctx)}
    receives, returns = ([lengths[axis] for axis in side.split()] for side in CONTRACT[kind(path)])
    if len(receives) == 2:
        given = torch.zeros(receives, dtype=torch.int64, device=like.device)
    else:
        given = torch.linspace(-1, 1, math.prod(receives), device=like.device).to(like.dtype)
        given = given.reshape(receives)
    asked = f"{path}: {name}, given {CONTRACT[kind(path)][0]!r} {receives}"
    wanted = f"wanted {CONTRACT[kind(path)][1]!r} {returns}, {like.dtype} on {like.device}"
    try:
        # Not even the random numbers of a dropout are to be other ones for having been tried.
        with torch.random.fork_rng(devices=[]):
            output = module(given)
    except Exception as error:
        raise SwapError(
            f"{asked}: {wanted}, but it raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(output, Tensor):
        raise SwapError(f"{asked}: {wanted}, but it gave a {type(output).__name__}")
    if ([*output.shape], output.dtype, output.device) != (returns, like.dtype, like.device):
        raise SwapError(
            f"{asked}: {wanted}, but it gave {[*output.shape]}, {output.dtype} on {output.device}"
        )


class SwapError(ValueError):
    """A pattern without a match, or a module that does not keep the contract."""
