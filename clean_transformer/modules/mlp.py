"""The two-layer MLP of each block."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.config import Config, ConfigLike
from clean_transformer.hooks import HookedModule, HookPoint
from clean_transformer.modules.linear import affine, normal, output_std


class MLP(HookedModule):
    """gelu(x W_in + b_in) W_out + b_out (Radford et al. 2018).

    Parameters: W_in [d_model d_mlp], W_out [d_mlp d_model], b_in [d_mlp], b_out [d_model].

    `gelu` is the tanh approximation ½x(1 + tanh(√(2/π)(x + 0.044715x³))) of the GELU (Hendrycks and
    Gimpel 2016). Hugging Face calls this approximation gelu_new. Its difference from the exact GELU
    is at most 5e-4.
    """

    def __init__(self, cfg: ConfigLike):
        super().__init__()
        self.cfg = cfg = Config.of(cfg)
        self.W_in = normal(cfg.d_model, cfg.d_mlp, std=cfg.initializer_range)
        self.b_in = nn.Parameter(torch.zeros(cfg.d_mlp))
        self.W_out = normal(cfg.d_mlp, cfg.d_model, std=output_std(cfg))
        self.b_out = nn.Parameter(torch.zeros(cfg.d_model))
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()

    def forward(
        self, normalized_resid_mid: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the MLP's output. Each output position depends only on the same input position.

        `hook_pre` and `hook_post` [batch pos d_mlp] get the activations before and after the GELU.
        """
        pre = self.hook_pre(affine(normalized_resid_mid, self.W_in, self.b_in))
        post = self.hook_post(F.gelu(pre, approximate="tanh"))
        return affine(post, self.W_out, self.b_out)
