"""Faults in the order and number of the blocks, in the final LayerNorm, and in the unembedding."""

from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.model import DemoTransformer
from clean_transformer.modules.unembed import TiedUnembed, Unembed
from clean_transformer.parity.faults.semantic.edits import (
    Changes,
    Edit,
    SemanticFault,
    child,
    edited,
)


def unembedding(edit: Edit) -> Changes:
    """Return the changes to our code that make the unembedding multiply by edit(W_U), not W_U.

    W_U has the shape [d_model d_vocab]. The changes affect both classes of unembeddings: `Unembed`,
    and `TiedUnembed`, in which W_U is the transpose of W_E.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.hook_out(self.hook_in(x) @ edit(self.W_U) + self.b_U)

    return tuple((owner, "forward", lambda _: forward) for owner in (Unembed, TiedUnembed))


def noise_like(weight: Tensor) -> Tensor:
    """Return normal random numbers with the shape and the standard deviation of `weight`."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(weight) * weight.std()


MODEL_FAULTS = (
    SemanticFault(
        "blocks-swapped",
        "the first two blocks run in the opposite order",
        "blocks.0.hook_resid_pre",
        child(
            DemoTransformer,
            "blocks",
            lambda blocks: nn.ModuleList([*blocks[:2][::-1], *blocks[2:]]),
        ),
    ),
    SemanticFault(
        "block-repeated",
        "the first block runs twice",
        "blocks.0.hook_resid_pre",
        child(DemoTransformer, "blocks", lambda blocks: nn.ModuleList([blocks[0], *blocks])),
    ),
    SemanticFault(
        "last-block-missing",
        "the last block does not run",
        "blocks.*.hook_resid_pre",
        child(DemoTransformer, "blocks", lambda blocks: blocks[:-1]),
    ),
    SemanticFault(
        "final-norm-missing",
        "the unembedding reads the residual stream as it is",
        "ln_final.hook_scale",
        child(DemoTransformer, "ln_final", lambda _: nn.Identity()),
    ),
    SemanticFault(
        "final-norm-bias-twice",
        "ln_final's bias is added twice",
        "ln_final",
        edited(DemoTransformer, {"ln_final.b": lambda b: 2 * b}),
    ),
    SemanticFault(
        "unembedding-untied",
        "the unembedding has fresh weights of its own",
        "unembed.hook_out",
        unembedding(noise_like),
    ),
    SemanticFault(
        "unembedding-rows-shifted",
        "each token has the logit of the one before it",
        "unembed.hook_out",
        unembedding(lambda W_U: W_U.roll(1, -1)),
    ),
    SemanticFault(
        "unembedding-reread",
        "the embedding's memory is read as [d_model d_vocab] and not transposed",
        "unembed.hook_out",
        unembedding(lambda W_U: W_U.T.reshape(W_U.shape)),
    ),
)
