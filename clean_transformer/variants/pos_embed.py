"""A replacement for `PosEmbed` that adds nothing to the token embeddings."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.hooks import HookedModule


class NoPositions(HookedModule):
    """A position embedding that returns zeros, so that the model gets no position embeddings.

    A causal model can learn positions without position embeddings (Haviv et al. 2022). This module
    is also for models whose attention encodes positions, such as `RotaryAttention`.
    """

    zero: Tensor

    def __init__(self, cfg: Config):
        super().__init__()
        # A buffer moves with the model to another dtype or device. The state dict contains only
        # persistent buffers, so it does not contain this buffer.
        self.register_buffer("zero", torch.zeros(cfg.d_model), persistent=False)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return zeros, in the model's dtype and on the model's device."""
        return self.zero.repeat(*tokens.shape, 1)
