"""A replacement for `PosEmbed` that adds nothing to the token embeddings."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.hooks import HookedModule


class NoPositions(HookedModule):
    """A position embedding that returns zeros, so that the model gets no position embeddings.

    Use this module if the attention encodes positions, as `RotaryAttention` does. A causal model
    without any position encoding can also learn positions (Haviv et al. 2022).
    """

    zero: Tensor

    def __init__(self, cfg: Config):
        super().__init__()
        # A buffer follows the model to another dtype or device. `persistent=False` keeps the buffer
        # out of the state dict.
        self.register_buffer("zero", torch.zeros(cfg.d_model), persistent=False)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return zeros, in the model's dtype and on the model's device."""
        return self.zero.repeat(*tokens.shape, 1)
