"""`x W + b` for attention, MLP and unembedding, and the random initialization of weights."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.config import Config


def affine(
    x: Float[Tensor, "*rows d_in"], W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"]
) -> Float[Tensor, "*rows d_out"]:
    """Return x W + b. One kernel multiplies and adds the bias, which saves memory traffic."""
    return F.linear(x, W.T, b)


def normal(*shape: int, std: float) -> nn.Parameter:
    """Return a new parameter of the given shape, drawn from N(0, std²)."""
    weight = torch.empty(*shape)
    # A tensor on the meta device has no numbers to fill. There, a call of `normal_` would only take
    # time, because the call imports PyTorch's reference implementations.
    return nn.Parameter(weight if weight.is_meta else weight.normal_(std=std))


def output_std(cfg: Config) -> float:
    """Return the initial standard deviation of W_O and W_out: initializer_range / √(2 n_layers).

    The attention and the MLP of each block add their outputs to the residual stream: 2 n_layers
    outputs in total. The division keeps the sum of these outputs from growing with n_layers
    (Radford et al. 2019, section 2.3).
    """
    return cfg.initializer_range / math.sqrt(2 * cfg.n_layers)
