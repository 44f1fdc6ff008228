"""Learned position embeddings."""

import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.config import Config, ConfigLike
from clean_transformer.hooks import HookedModule
from clean_transformer.modules.linear import normal


class PosEmbed(HookedModule):
    """Position embedding: row p of W_pos [n_ctx d_model] for position p (Radford et al. 2018)."""

    def __init__(self, cfg: ConfigLike):
        super().__init__()
        self.cfg = cfg = Config.of(cfg)
        self.W_pos = normal(cfg.n_ctx, cfg.d_model, std=cfg.initializer_range)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the embeddings of `positions`. Default positions: 0, 1, 2, … for every input."""
        if positions is not None:
            return F.embedding(positions, self.W_pos)
        batch, length = tokens.shape
        return repeat(self.W_pos[:length], "pos d_model -> batch pos d_model", batch=batch)
