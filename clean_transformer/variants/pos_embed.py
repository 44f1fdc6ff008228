"""A replacement for position embeddings that adds nothing."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.hooks import HookedModule


class NoPositions(HookedModule):
    """Zeros instead of position embeddings.

    A causal model can learn positions without position embeddings (Haviv et al. 2022). Or use this
    module with attention that encodes positions itself, such as `RotaryAttention`.
    """

    zero: Tensor

    def __init__(self, cfg: Config):
        super().__init__()
        # A buffer moves with the model to another dtype or device. The state dict leaves it out.
        self.register_buffer("zero", torch.zeros(cfg.d_model), persistent=False)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Zeros in the model's dtype, on the model's device."""
        return self.zero.repeat(*tokens.shape, 1)
