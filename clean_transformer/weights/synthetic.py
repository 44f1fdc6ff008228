"""Draws seeded random weights that have the same bits on every machine.

Tests, parity checks and benchmarks use these weights instead of the published weights, so they need
no download. `torch.randn` gives different bits on different processors, because the processors
compute logarithms and cosines differently. In this module, each value starts as a sum of random
integers (see `_bell`). NumPy guarantees that its bit generator `SFC64` always gives the same
integers for the same seed. All further operations are elementwise `+`, `-`, `*`, `/` and `sqrt`.
IEEE 754 prescribes the rounding of these operations, so every machine gets the same bits. The code
never sums floats over an axis, because different machines may add them in different orders.
"""

import math
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.weights.shapes import READERS, WRITERS, parameter_shapes

Array = NDArray[np.float32]


# `_bell` draws this many values at a time, because so many values fit into the processor's cache.
CHUNK = 2**16


# Every 257th entry of a flattened tensor is an outlier: `_draw` makes this entry larger. 257 is
# prime. Therefore all columns of a large matrix get outliers, unless the number of columns is a
# multiple of 257.
STRIDE = 257


# The kurtosis of the values that `_bell` draws. Each value is a sum of twelve independent uniform
# values, and the kurtosis of such a sum is 3 − 1.2 / 12.
BELL_KURTOSIS = 2.9


class Spread(NamedTuple):
    """The distribution of a tensor's entries: standard deviation, kurtosis and mean.

    If `largest` is not None, every 257th entry (an outlier) has the value `largest`.
    """

    std: float
    kurtosis: float = BELL_KURTOSIS
    mean: float = 0.0
    largest: float | None = None


# The d_model of GPT-2 small. The numbers in OUTSIDE_BLOCKS and IN_BLOCKS were measured in GPT-2
# small, except the numbers for W_E, W_in and W_out, which are guesses.
MEASURED_WIDTH = 768


OUTSIDE_BLOCKS = {
    "embed.W_E": Spread(0.14),
    "pos_embed.W_pos": Spread(0.122, 40),
    "ln_final.w": Spread(0.3, mean=1.4, largest=17.4),
    "ln_final.b": Spread(0.42, 175),
    "unembed.W_U": Spread(0.14),
    "unembed.b_U": Spread(0.0),
}


# Each tuple has three entries: for the first block, for the middle blocks, and for the last block.
# If the model has fewer than four blocks, all blocks after the first block use the middle entry.
IN_BLOCKS = {
    "ln1.w": (
        Spread(0.041, mean=0.18, largest=0.25),
        Spread(0.04, mean=0.32, largest=0.8),
        Spread(0.05, mean=0.48, largest=0.96),
    ),
    "ln1.b": (Spread(0.036, 12), Spread(0.02, largest=1.0), Spread(0.02, largest=0.9)),
    "attn.W_Q": (Spread(0.24, 4.2), Spread(0.15, 4), Spread(0.11, 3.3)),
    "attn.W_K": (Spread(0.24, 6.4), Spread(0.145, 4.5), Spread(0.105, 3.7)),
    "attn.W_V": (Spread(0.058, 4.1), Spread(0.105, 3.5), Spread(0.16, 4)),
    "attn.W_O": (Spread(0.147, 29), Spread(0.105, 8), Spread(0.18, 193)),
    "attn.b_Q": (Spread(0.34, 3.6), Spread(0.19, 8), Spread(0.18, 4.3)),
    "attn.b_K": (Spread(0.18, 13), Spread(0.1, 3.1), Spread(0.086, 3.8)),
    "attn.b_V": (Spread(0.048, 17), Spread(0.055, 30), Spread(0.055, 11)),
    "attn.b_O": (Spread(0.26, 52), Spread(0.13, 8), Spread(0.47, 91)),
    "ln2.w": (
        Spread(0.27, mean=0.87, largest=1.5),
        Spread(0.03, mean=0.27, largest=1.1),
        Spread(0.09, mean=0.5, largest=1.2),
    ),
    "ln2.b": (Spread(0.07, 54), Spread(0.04, 60), Spread(0.039, 50)),
    "mlp.W_in": (Spread(0.06, 4), Spread(0.13, 4), Spread(0.13, 4)),
    "mlp.b_in": (Spread(0.13, 3.3, -0.09), Spread(0.092, 9, -0.085), Spread(0.093, 15, -0.064)),
    "mlp.W_out": (Spread(0.02, 10), Spread(0.03, 10), Spread(0.03, 10)),
    "mlp.b_out": (Spread(0.1, 78), Spread(0.125, 30), Spread(0.108, 3.2)),
}


def plain(cfg: Config, seed: int = 0) -> dict[str, Tensor]:
    """Return float32 weights that resemble the weights of an untrained model.

    The keys of the result are the parameter names. The weights have a bell-shaped distribution with
    the standard deviation `cfg.initializer_range`. The gains of LayerNorms have the mean 1, and all
    other parameters have the mean 0. All entries of `unembed.b_U` are 0, because most checkpoint
    formats cannot store this parameter.
    """

    def spread(name: str) -> Spread:
        if name == "unembed.b_U":
            return Spread(0.0)
        return Spread(cfg.initializer_range, mean=1.0 if name.endswith(".w") else 0.0)

    return {name: torch.from_numpy(drawn) for name, drawn in _draw_all(cfg, seed, spread).items()}


def stress(cfg: Config, seed: int = 0) -> dict[str, Tensor]:
    """Return float32 weights with the statistics and the huge activations of the published GPT-2.

    The keys of the result are the parameter names. The tensors have about the standard deviations,
    kurtoses and largest entries of GPT-2 small, whose `d_model` is 768. For any other `d_model`,
    this function multiplies the matrices in the blocks by √(768 / d_model). If `cfg.tied_unembed`
    is False, the unembedding is drawn independently of the embedding.

    As in GPT-2, a few activations are huge. If `d_model` is at least 32, the third block sets three
    coordinates of the residual stream at position 0 to about 3,000, and they stay about as large in
    later blocks. In a model with fewer than three blocks, the last block sets them. In a model with
    twelve blocks, the median magnitude of the other coordinates is 0.9 after the first block, and 6
    after the last block. From the fourth block on, many heads attend to position 0 if no other
    position matches their query.

    For `normalization_type="LNPre"`, this function first draws the weights for "LN". Then it
    multiplies the weights that read the output of a LayerNorm by the gain of this LayerNorm, and
    removes the gains and the biases of all LayerNorms.
    """
    with_norms = replace(cfg, normalization_type="LN")
    state = _draw_all(with_norms, seed, lambda name: _published_spread(name, cfg))
    _plant_massive_activation(state, cfg)
    if cfg.normalization_type == "LNPre":
        _fold_gains(state, cfg)
    return {name: torch.from_numpy(state[name]) for name in parameter_shapes(cfg)}


def _published_spread(name: str, cfg: Config) -> Spread:
    if name in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[name]
    _, layer, kind = name.split(".", 2)
    first, middle, last = IN_BLOCKS[kind]
    spread = first if layer == "0" else last if 2 < int(layer) == cfg.n_layers - 1 else middle
    return spread._replace(std=spread.std * _scale(cfg)) if ".W_" in kind else spread


def _scale(cfg: Config) -> float:
    """Return √(768 / d_model), the factor by which each matrix in a block is multiplied.

    Then the result of a matrix product over d_model is about as large as in GPT-2 small.
    """
    return math.sqrt(MEASURED_WIDTH / cfg.d_model)


def _plant_massive_activation(state: dict[str, Array], cfg: Config) -> None:
    """Make three coordinates of the residual stream huge at position 0.

    In these coordinates, W_pos has the value 4.5 at position 0 and −0.5 elsewhere. One MLP neuron
    detects the 4.5 and writes huge values into the same coordinates. The heads of later blocks
    attend to position 0 because of these huge values.
    """
    # No earlier attention or MLP writes into the three coordinates, so they still have the values
    # of W_pos when the neuron reads them.
    layer = min(2, cfg.n_layers - 1)
    coordinates = [cfg.d_model * quarter // 4 for quarter in (1, 2, 3)]
    for earlier in range(layer + 1):
        for writer in WRITERS:
            state[f"blocks.{earlier}.{writer}"][..., coordinates] = 0
    state["pos_embed.W_pos"][:, coordinates] = -0.5
    state["pos_embed.W_pos"][0, coordinates] = 4.5

    # Before ln2 multiplies by its gain, the sum of the three normalized coordinates is about 3 at
    # position 0 and about 0 elsewhere. The input of the neuron's GELU is 10 × this sum − 8, so the
    # neuron is active if the sum is above 0.8.
    gain = _published_spread(f"blocks.{layer}.ln2.w", cfg).mean
    mlp = f"blocks.{layer}.mlp"
    state[f"{mlp}.W_in"][:, 0] = 0
    state[f"{mlp}.W_in"][coordinates, 0] = 10 / gain
    state[f"{mlp}.b_in"][0] = -8
    state[f"{mlp}.W_out"][0] = 0
    state[f"{mlp}.W_out"][0, coordinates] = 140

    # With these weights, the key of each head at position 0 has about the direction of the head's
    # b_Q. Every query of the head is a sum that contains b_Q, so the head attends to position 0.
    # The value vector of the head at position 0 is nearly 0.
    for later in range(layer + 1, cfg.n_layers):
        attn = f"blocks.{later}.attn"
        state[f"{attn}.W_K"][:, coordinates] = state[f"{attn}.b_Q"][:, None] * _scale(cfg)
        state[f"{attn}.W_V"][:, coordinates] = 0


def _fold_gains(state: dict[str, Array], cfg: Config) -> None:
    """Multiply, in place, each weight [..., d_model, out] after a LayerNorm by the gain."""
    for layer in range(cfg.n_layers):
        for ln, readers in READERS.items():
            for reader in readers:
                state[f"blocks.{layer}.{reader}"] *= state[f"blocks.{layer}.{ln}.w"][:, None]
    state["unembed.W_U"] *= state["ln_final.w"][:, None]


def _draw_all(cfg: Config, seed: int, spread: Callable[[str], Spread]) -> dict[str, Array]:
    """Draw all tensors of a model with the architecture `cfg`, and return them by name.

    `spread` takes the name of a tensor and returns the `Spread` of its entries.
    """
    shapes = parameter_shapes(cfg)
    # The threads draw tensors in parallel, because NumPy releases the GIL.
    with ThreadPoolExecutor() as pool:
        drawn = pool.map(lambda name: _draw(name, shapes[name], seed, spread(name)), shapes)
        state = dict(zip(shapes, drawn, strict=True))
    for name, value in state.items():
        if name.endswith((".W_Q", ".W_K", ".W_V")):
            # The memory order of `modules.attention.input_weight`, so that a model can use the
            # array without a copy.
            state[name] = np.ascontiguousarray(value.transpose(1, 0, 2)).transpose(1, 0, 2)
    return state


def _draw(name: str, shape: tuple[int, ...], seed: int, spread: Spread) -> Array:
    """Return the tensor `name` with the given shape. Its entries have the distribution `spread`."""
    # The outliers are the share p of all values. If we multiply the outliers by √(1 + e), the
    # variance becomes 1 + p·e, and the kurtosis becomes BELL_KURTOSIS · (1 + r²), where
    # r = √(p (1 − p)) · e / (1 + p·e). We compute r from the kurtosis, and e (`excess`) from r.
    values = _bell(name, math.prod(shape), seed)
    p = 1 / STRIDE
    r = math.sqrt(spread.kurtosis / BELL_KURTOSIS - 1)
    excess = r / (math.sqrt(p * (1 - p)) - p * r)
    values[::STRIDE] *= math.sqrt(1 + excess)
    values *= spread.std / math.sqrt(1 + p * excess)
    values += spread.mean
    if spread.largest is not None:
        values[::STRIDE] = spread.largest
    return values.reshape(shape)


def _bell(name: str, count: int, seed: int) -> Array:
    """Return `count` bell-shaped values with mean 0 and variance 1.

    Each value is a sum of twelve random 16-bit integers (Irwin–Hall distribution), shifted and
    scaled. `seed` and `name` together seed the random generator, so the values of one tensor do not
    depend on which other tensors are drawn.
    """
    stream = np.random.SFC64([seed, zlib.crc32(name.encode())])
    values = np.empty(count, dtype=np.float32)
    for start in range(0, count, CHUNK):
        chunk = values[start : start + CHUNK]
        words = stream.random_raw(3 * len(chunk)).astype("<u8", copy=False)
        sums = words.view("<u2").reshape(12, -1).sum(axis=0, dtype=np.int32)
        chunk[:] = sums - 6 * (2**16 - 1)
        chunk /= 2**16
    return values
