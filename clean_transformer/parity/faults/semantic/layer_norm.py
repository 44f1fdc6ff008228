"""Faults inside LayerNorm."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clean_transformer.modules.layer_norm import LayerNorm, LayerNormPre
from clean_transformer.parity.faults.semantic.edits import (
    Changes,
    Edit,
    SemanticFault,
    edited,
    unchanged,
    without,
)
from clean_transformer.support.numerics import at_least_float32


def normalizing(
    root: Callable[[Tensor, float], Tensor] = lambda variance, eps: (variance + eps).sqrt(),
    center: Edit = lambda x: x - x.mean(-1, keepdim=True),
    spread: Edit = lambda centered: centered.square().mean(-1, keepdim=True),
) -> Changes:
    """Return the changes to our code that plant a fault in LayerNorm.

    The caller passes one wrong function; the others are right by default. `center(x)` returns the
    centered activations, and `spread(centered)` returns their variance.
    `root(variance, eps)` returns the number by which the centered activations are divided. The
    changes affect `LayerNorm`, and also `LayerNormPre`, which has no gain and no bias.
    """

    def normalize(self: Any, residual: Tensor) -> Tensor:
        centered = center(at_least_float32(residual))
        scale = self.hook_scale(root(spread(centered), self.eps))
        return self.hook_normalized(centered / scale).to(residual.dtype)

    def forward(self: Any, residual: Tensor) -> Tensor:
        return self.normalize(residual) * self.w + self.b

    return (
        (LayerNormPre, "normalize", lambda _: normalize),
        (LayerNormPre, "forward", lambda _: normalize),
        (LayerNorm, "forward", lambda _: forward),
    )


LAYER_NORM_FAULTS = (
    SemanticFault(
        "unbiased-variance",
        "LayerNorm divides the squares by d_model - 1",
        "blocks.0.ln1.hook_scale",
        normalizing(spread=lambda centered: centered.var(-1, keepdim=True)),
    ),
    SemanticFault(
        "epsilon-outside-root",
        "LayerNorm divides by √var + eps",
        "blocks.0.ln1.hook_scale",
        normalizing(root=lambda variance, eps: variance.sqrt() + eps),
    ),
    SemanticFault(
        "epsilon-1e-6",
        "LayerNorm's epsilon is 1e-6",
        "blocks.0.ln1.hook_scale",
        normalizing(root=lambda variance, eps: (variance + 1e-6).sqrt()),
    ),
    SemanticFault(
        "epsilon-1e-12",
        "LayerNorm's epsilon is 1e-12, BERT's",
        "blocks.0.ln1.hook_scale",
        normalizing(root=lambda variance, eps: (variance + 1e-12).sqrt()),
    ),
    SemanticFault(
        "root-missing",
        "LayerNorm divides by the variance",
        "blocks.0.ln1.hook_scale",
        normalizing(root=lambda variance, eps: variance + eps),
    ),
    SemanticFault(
        "centering-missing",
        "LayerNorm divides by the root mean square and does not center",
        "blocks.0.ln1.hook_scale",
        normalizing(center=unchanged),
    ),
    SemanticFault(
        "gain-missing",
        "LayerNorms have no gain",
        "blocks.0.ln1",
        edited(LayerNorm, {"w": torch.ones_like}),
    ),
    SemanticFault(
        "gain-plus-one",
        "LayerNorms multiply by 1 + w, as Gemma does",
        "blocks.0.ln1",
        edited(LayerNorm, {"w": lambda w: 1 + w}),
    ),
    SemanticFault(
        "gain-twice",
        "LayerNorms multiply by the gain twice",
        "blocks.0.ln1",
        edited(LayerNorm, {"w": torch.square}),
    ),
    SemanticFault(
        "norm-bias-missing",
        "LayerNorms have no bias",
        "blocks.0.ln1",
        edited(LayerNorm, without("b")),
    ),
)
