"""Faults in how a block connects LayerNorm, attention and MLP with the residual stream."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.kv_cache import LayerCache
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.parity.faults.semantic.edits import Changes, SemanticFault, child, mistaken


def wired(
    mid: Callable[[Tensor, Tensor], Tensor] = torch.add,
    mlp_reads: Callable[[Tensor, Tensor], Tensor] = lambda resid_pre, resid_mid: resid_mid,
    post: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> Changes:
    """Return the changes to our code that plant a fault in a block's residual stream.

    `mid(resid_pre, attn_out)` replaces the addition after attention. `post(resid_mid, mlp_out)`
    replaces the addition after the MLP. `mlp_reads(resid_pre, resid_mid)` returns the input of
    `ln2`, the LayerNorm before the MLP.
    """

    def forward(self: Any, resid_pre: Tensor, kv_cache: LayerCache | None = None) -> Tensor:
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(self.attn(*self.attn_inputs(resid_pre), kv_cache=kv_cache))
        resid_mid = self.hook_resid_mid(mid(resid_pre, attn_out))
        mlp_in = self.hook_mlp_in(mlp_reads(resid_pre, resid_mid))
        return self.hook_resid_post(post(resid_mid, self.hook_mlp_out(self.mlp(self.ln2(mlp_in)))))

    return ((TransformerBlock, "forward", lambda _: forward),)


def post_norm(self: Any, resid_pre: Tensor, kv_cache: LayerCache | None = None) -> Tensor:
    """Run a block with LayerNorm after each addition, as in GPT-1 (Radford et al. 2018).

    This function replaces `TransformerBlock.forward`.
    """
    resid_pre = self.hook_resid_pre(resid_pre)
    attn_out = self.hook_attn_out(self.attn(resid_pre, kv_cache=kv_cache))
    resid_mid = self.ln1(self.hook_resid_mid(resid_pre + attn_out))
    mlp_out = self.hook_mlp_out(self.mlp(self.hook_mlp_in(resid_mid)))
    return self.hook_resid_post(self.ln2(resid_mid + mlp_out))


BLOCK_FAULTS = (
    SemanticFault(
        "norms-swapped",
        "a block's two LayerNorms have each other's gain and bias",
        "blocks.0.ln1",
        mistaken(
            TransformerBlock,
            {"ln1.w": "ln2.w", "ln1.b": "ln2.b", "ln2.w": "ln1.w", "ln2.b": "ln1.b"},
        ),
    ),
    SemanticFault(
        "norm-before-attention-missing",
        "attention reads the residual stream as it is",
        "blocks.0.ln1.hook_scale",
        child(TransformerBlock, "ln1", lambda _: nn.Identity()),
    ),
    SemanticFault(
        "norm-before-mlp-missing",
        "the MLP reads the residual stream as it is",
        "blocks.0.ln2.hook_scale",
        child(TransformerBlock, "ln2", lambda _: nn.Identity()),
    ),
    SemanticFault(
        "post-norm",
        "blocks normalize after each addition, not before attention and MLP",
        "blocks.0.ln1.hook_scale",
        ((TransformerBlock, "forward", lambda _: post_norm),),
    ),
    SemanticFault(
        "attention-residual-missing",
        "attention replaces the residual stream",
        "blocks.0.hook_resid_mid",
        wired(mid=lambda resid_pre, attn_out: attn_out),
    ),
    SemanticFault(
        "attention-added-twice",
        "attention is added to the residual stream twice",
        "blocks.0.hook_resid_mid",
        wired(mid=lambda resid_pre, attn_out: resid_pre + 2 * attn_out),
    ),
    SemanticFault(
        "parallel-mlp",
        "the MLP reads what attention reads, as in GPT-J",
        "blocks.0.hook_mlp_in",
        wired(mlp_reads=lambda resid_pre, resid_mid: resid_pre),
    ),
    SemanticFault(
        "mlp-residual-missing",
        "the MLP replaces the residual stream",
        "blocks.0.hook_resid_post",
        wired(post=lambda resid_mid, mlp_out: mlp_out),
    ),
    SemanticFault(
        "mlp-subtracted",
        "the MLP is subtracted from the residual stream",
        "blocks.0.hook_resid_post",
        wired(post=torch.sub),
    ),
)
