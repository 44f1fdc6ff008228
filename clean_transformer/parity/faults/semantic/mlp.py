"""Faults in the MLP."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.modules.mlp import MLP
from clean_transformer.parity.faults.semantic.edits import (
    Changes,
    Edit,
    SemanticFault,
    edited,
    element,
    reread,
    without,
)


def activation(function: Edit) -> Changes:
    """Return the changes to our code that make `function` the activation function of the MLP."""

    def forward(self: Any, x: Tensor) -> Tensor:
        post = self.hook_post(function(self.hook_pre(x @ self.W_in + self.b_in)))
        return post @ self.W_out + self.b_out

    return ((MLP, "forward", lambda _: forward),)


def tanh_gelu(cubic: float = 0.044715, root: float = math.sqrt(2 / math.pi)) -> Edit:
    """Return the tanh form of GELU (Hendrycks and Gimpel 2016) with the given constants.

    This form is ½x(1 + tanh(root · (x + cubic · x³))). The default constants are the right ones.
    """
    return lambda x: 0.5 * x * (1 + torch.tanh(root * (x + cubic * x**3)))


def next_float32(weight: Tensor) -> Tensor:
    """Increase each element of `weight` by the distance to the next larger float32 number."""
    single = weight.float()
    return weight + (torch.nextafter(single, torch.full_like(single, math.inf)) - single)


MLP_FAULTS = (
    SemanticFault(
        "input-bias-missing",
        "b_in is not added",
        "blocks.0.mlp.hook_pre",
        edited(MLP, without("b_in")),
    ),
    SemanticFault(
        "input-weight-reread",
        "W_in's memory is read as that of its transpose",
        "blocks.0.mlp.hook_pre",
        edited(MLP, {"W_in": reread}),
    ),
    SemanticFault(
        "one-weight-last-bit",
        "one element of W_in is one unit in float32's last place too large",
        "blocks.0.mlp.hook_pre",
        edited(DemoTransformer, {"blocks.0.mlp.W_in": element(next_float32, 0, 0)}),
    ),
    SemanticFault(
        "exact-gelu",
        "GELU has the error function, not its tanh form",
        "blocks.0.mlp.hook_post",
        activation(F.gelu),
    ),
    SemanticFault(
        "sigmoid-gelu",
        "GELU is x σ(1.702 x)",
        "blocks.0.mlp.hook_post",
        activation(lambda x: x * torch.sigmoid(1.702 * x)),
    ),
    SemanticFault(
        "relu",
        "the activation function is ReLU",
        "blocks.0.mlp.hook_post",
        activation(F.relu),
    ),
    SemanticFault(
        "silu",
        "the activation function is SiLU",
        "blocks.0.mlp.hook_post",
        activation(F.silu),
    ),
    SemanticFault(
        "gelu-cubic-truncated",
        "GELU's 0.044715 is cut to 0.0447",
        "blocks.0.mlp.hook_post",
        activation(tanh_gelu(cubic=0.0447)),
    ),
    SemanticFault(
        "gelu-root-rounded",
        "GELU's √(2/π) is rounded to 0.7979",
        "blocks.0.mlp.hook_post",
        activation(tanh_gelu(root=0.7979)),
    ),
    SemanticFault(
        "mlp-output-bias-missing",
        "b_out is not added",
        "blocks.0.hook_mlp_out",
        edited(MLP, without("b_out")),
    ),
    SemanticFault(
        "mlp-output-weight-reread",
        "W_out's memory is read as that of its transpose",
        "blocks.0.hook_mlp_out",
        edited(MLP, {"W_out": reread}),
    ),
)
