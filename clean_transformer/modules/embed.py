"""Token embedding."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.config import Config, ConfigLike
from clean_transformer.hooks import HookedModule
from clean_transformer.modules.linear import normal


class Embed(HookedModule):
    """Token embedding: row t of W_E [d_vocab d_model] for token id t (Radford et al. 2019)."""

    def __init__(self, cfg: ConfigLike):
        super().__init__()
        self.cfg = cfg = Config.of(cfg)
        self.W_E = normal(cfg.d_vocab, cfg.d_model, std=cfg.initializer_range)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the embeddings of the tokens. Token ids are from 0 to d_vocab - 1."""
        return F.embedding(tokens, self.W_E)
