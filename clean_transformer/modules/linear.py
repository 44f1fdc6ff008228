"""x W + b: the one product that attention, MLP and unembedding are made of."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def affine(
    x: Float[Tensor, "*rows d_in"], W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"]
) -> Float[Tensor, "*rows d_out"]:
    """x W + b. The bias is added within the product, which saves a pass over memory."""
    return F.linear(x, W.T, b)


def normal(*shape: int, std: float) -> nn.Parameter:
    """A parameter drawn from N(0, std²); on the meta device, which holds no numbers, its shape."""
    weight = torch.empty(*shape)
    # Drawing there would load the whole of PyTorch's reference library, for nothing.
    return nn.Parameter(weight if weight.is_meta else weight.normal_(std=std))
