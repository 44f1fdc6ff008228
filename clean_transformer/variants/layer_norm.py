"""Normalization by the root mean square, without subtracting the mean."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.modules.layer_norm import LayerNormPre
from clean_transformer.support.numerics import at_least_float32


class RMSNorm(LayerNormPre):
    """x / √(mean(x²) + eps) · w (Zhang and Sennrich 2019, equation 4): no centering, no bias.

    The parameter w [d_model] is the gain. `hook_scale` gets √(mean(x²) + eps), and
    `hook_normalized` gets the output before it is multiplied by w.
    """

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.w = nn.Parameter(torch.ones(cfg.d_model))

    def forward(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Normalize each vector [d_model] of `residual` to mean square 1, and multiply it by w.

        Because of eps, the mean square before this multiplication is slightly less than 1.
        """
        return self.normalize(residual) * self.w

    def normalize(
        self, residual: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Return each vector x divided by √(mean(x²) + eps), computed in float32 or float64."""
        exact = at_least_float32(residual)
        scale = self.hook_scale((exact.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized(exact / scale).to(residual.dtype)
