"""TODO variants/pos_embed."""

import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.hooks import HookedModule
from clean_transformer.variants.attention import Stream, Tokens


class NoPositions(HookedModule):
    """Zeros for `PosEmbed`: a causal model can count without (Haviv et al. 2022)."""

    zero: Tensor

    def __init__(self, cfg: Config):
        super().__init__()
        # Only for the model's dtype and device, and in no checkpoint.
        self.register_buffer("zero", torch.zeros(cfg.d_model), persistent=False)

    def forward(self, tokens: Tokens, positions: Tokens | None = None) -> Stream:
        """The same for all tokens and positions."""
        return self.zero.repeat(*tokens.shape, 1)
