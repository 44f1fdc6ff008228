"""x W + b: the one product that attention, MLP and unembedding are made of."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def affine(
    x: Float[Tensor, "*rows d_in"], W: Float[Tensor, "d_in d_out"], b: Float[Tensor, "d_out"]
) -> Float[Tensor, "*rows d_out"]:
    """x W + b. The bias is added within the product, which saves a pass over memory."""
    return F.linear(x, W.T, b)
