"""No position embedding at all."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.hooks import HookedModule


class NoPositions(HookedModule):
    """Zeros instead of position embeddings.

    A causal model can learn positions without them (Haviv et al. 2022). Use it with attention that
    has positions of its own, such as `RotaryAttention`.
    """

    zero: Tensor

    def __init__(self, cfg: Config):
        super().__init__()
        # The buffer follows the model's dtype and device, and is in no checkpoint.
        self.register_buffer("zero", torch.zeros(cfg.d_model), persistent=False)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Zeros, in the model's dtype."""
        return self.zero.repeat(*tokens.shape, 1)
