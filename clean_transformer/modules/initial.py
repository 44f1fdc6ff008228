"""What parameters hold before training."""

import torch
from torch import nn


def normal(*shape: int, std: float) -> nn.Parameter:
    """A parameter drawn from N(0, std²); on the meta device, which holds no numbers, its shape."""
    weight = torch.empty(*shape)
    # Drawing there would load the whole of PyTorch's reference library, for nothing.
    return nn.Parameter(weight if weight.is_meta else weight.normal_(std=std))
