"""Layer normalization, with and without gain and bias (Ba et al. 2016)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.config import Config, ConfigLike
from clean_transformer.hooks import HookedModule, HookPoint, observed
from clean_transformer.support.numerics import at_least_float32


class LayerNormPre(HookedModule):
    """LayerNorm without gain and bias: (x - mean) / √(var + eps) over d_model.

    `hook_scale` gets √(var + eps) [batch pos 1], and `hook_normalized` gets the output. In a
    half-precision model, both hook points get float32, as in TransformerLens.
    """

    def __init__(self, cfg: ConfigLike):
        super().__init__()
        self.cfg = cfg = Config.of(cfg)
        self.eps = cfg.eps
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return `residual`, with each vector [d_model] normalized to mean 0 and variance 1.

        Because of eps, the variance is slightly less than 1.
        """
        if observed(self.hook_scale, self.hook_normalized):
            return self.normalize(residual)
        return F.layer_norm(residual, residual.shape[-1:], eps=self.eps)

    def normalize(
        self, residual: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Normalize each vector [d_model] of `residual` step by step, not with a fused kernel.

        `hook_scale` gets √(var + eps), and `hook_normalized` gets the result.
        """
        # The variance cannot be computed in half precision: the square of 3,000 overflows float16.
        exact = at_least_float32(residual)
        centered = exact - exact.mean(dim=-1, keepdim=True)
        variance = centered.pow(2).mean(dim=-1, keepdim=True)
        scale = self.hook_scale((variance + self.eps).sqrt())
        return self.hook_normalized(centered / scale).to(residual.dtype)


class LayerNorm(LayerNormPre):
    """(x - mean) / √(var + eps) · w + b over d_model (Ba et al. 2016, equation 4).

    The variance is biased: the sum of squares is divided by d_model, not by d_model - 1. The
    parameters are the gain w [d_model] and the bias b [d_model]. `hook_normalized` gets
    (x - mean) / √(var + eps), without gain and bias, as in `HookedTransformer`.
    """

    def __init__(self, cfg: ConfigLike):
        super().__init__(cfg)
        self.w = nn.Parameter(torch.ones(cfg.d_model))
        self.b = nn.Parameter(torch.zeros(cfg.d_model))

    def forward(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Normalize each vector [d_model] of `residual`; return the normalized vector · w + b."""
        if observed(self.hook_scale, self.hook_normalized):
            return self.normalize(residual) * self.w + self.b
        return F.layer_norm(residual, residual.shape[-1:], self.w, self.b, self.eps)


NORMALIZATIONS = {"LN": LayerNorm, "LNPre": LayerNormPre}
