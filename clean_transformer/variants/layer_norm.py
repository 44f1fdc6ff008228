"""TODO variants/layer_norm."""

import torch
from torch import nn

from clean_transformer.config import Config
from clean_transformer.modules.layer_norm import LayerNormPre
from clean_transformer.variants.attention import Rows


class RMSNorm(LayerNormPre):
    """x / √(mean(x²) + eps) · w (Zhang and Sennrich 2019, equation 4): no centring, no bias.

    w [d_model]. The hook points are LayerNorm's.
    """

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.w = nn.Parameter(torch.ones(cfg.d_model))

    def forward(self, residual: Rows) -> Rows:
        """Rows of mean square 1, but for eps, times w."""
        return self.normalize(residual) * self.w

    def normalize(self, residual: Rows) -> Rows:
        """Divide by the scale √(mean(x²) + eps), in float32 at least."""
        exact = residual.to(torch.promote_types(residual.dtype, torch.float32))
        scale = self.hook_scale((exact.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized(exact / scale).to(residual.dtype)
