"""x W + b, the product that attention, MLP and unembedding use, and how new weights are drawn."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.config import Config


def affine(
    x: Float[Tensor, "*rows d_in"], W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"]
) -> Float[Tensor, "*rows d_out"]:
    """x W + b. The product adds the bias itself, which saves a pass over memory."""
    return F.linear(x, W.T, b)


def normal(*shape: int, std: float) -> nn.Parameter:
    """A parameter of that shape, drawn from N(0, std²), or without numbers on the meta device."""
    weight = torch.empty(*shape)
    # On the meta device, `normal_` would import PyTorch's reference implementations for nothing.
    return nn.Parameter(weight if weight.is_meta else weight.normal_(std=std))


def output_std(cfg: Config) -> float:
    """The standard deviation for weights that write to the residual stream.

    It is divided by √(2 n_layers), because the stream sums 2 n_layers outputs (Radford et al. 2019,
    section 2.3).
    """
    return cfg.initializer_range / math.sqrt(2 * cfg.n_layers)
