"""MLPs with other activation functions."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.hooks import HookPoint
from clean_transformer.modules.linear import normal
from clean_transformer.modules.mlp import MLP

Stream = Float[Tensor, "batch pos d_model"]


class ExactGeluMLP(MLP):
    """An MLP with the exact GELU x Φ(x), where Φ is the standard normal distribution function.

    Source: Hendrycks and Gimpel 2016.
    """

    def forward(self, normalized_resid_mid: Stream) -> Stream:
        """Return gelu(x W_in + b_in) W_out + b_out, where x is the input."""
        pre = self.hook_pre(normalized_resid_mid @ self.W_in + self.b_in)
        return self.hook_post(F.gelu(pre)) @ self.W_out + self.b_out


class ReluMLP(MLP):
    """An MLP with max(x, 0) instead of the GELU (Vaswani et al. 2017, equation 2)."""

    def forward(self, normalized_resid_mid: Stream) -> Stream:
        """Return relu(x W_in + b_in) W_out + b_out, where x is the input."""
        pre = self.hook_pre(normalized_resid_mid @ self.W_in + self.b_in)
        return self.hook_post(F.relu(pre)) @ self.W_out + self.b_out


class SwigluMLP(MLP):
    """(silu(x W_gate) ⊙ x W_in + b_in) W_out + b_out (Shazeer 2020, equation 6).

    W_gate is [d_model d_mlp]. The formula in the paper has no biases. This module adds biases at
    the same places as TransformerLens, and has the same names of hook points: `hook_pre` gets
    x W_gate, `hook_pre_linear` gets x W_in, and `hook_post` gets the input of W_out. All three are
    [batch pos d_mlp].
    """

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.W_gate = normal(cfg.d_model, cfg.d_mlp, std=cfg.initializer_range)
        self.hook_pre_linear = HookPoint()

    def forward(self, normalized_resid_mid: Stream) -> Stream:
        """Return the MLP's output. Each output position depends only on the same input position."""
        pre = self.hook_pre(normalized_resid_mid @ self.W_gate)
        pre_linear = self.hook_pre_linear(normalized_resid_mid @ self.W_in)
        post = self.hook_post(F.silu(pre) * pre_linear + self.b_in)
        return post @ self.W_out + self.b_out

    @torch.no_grad()
    def load_from(self, old: MLP) -> None:
        """Copy W_in, W_out and b_out of `old`.

        b_in is not copied, because an `MLP` adds its b_in before the activation function, and this
        module adds its b_in after the multiplication by silu(x W_gate).
        """
        for name in ("W_in", "W_out", "b_out"):
            self.get_parameter(name).copy_(old.get_parameter(name))
