"""Mistakes of code that loads weights: what it does to the values of a kind of parameter."""

import torch

from clean_transformer.parity.faults.semantic.edits import Edit

# The keys are names of parameters in the state dict of a model with two blocks.
LOADER_FAULTS: dict[str, Edit] = {
    "embed.W_E": lambda w: w.roll(1, 0),
    "pos_embed.W_pos": lambda w: w.roll(1, 0),
    "blocks.0.ln1.w": torch.ones_like,
    "blocks.0.ln1.b": torch.zeros_like,
    "blocks.0.attn.W_Q": lambda w: w.roll(1, 0),
    "blocks.0.attn.W_K": lambda w: w.roll(1, 2),
    "blocks.1.attn.W_V": lambda w: w.roll(1, 1),
    "blocks.1.attn.W_O": lambda w: w.roll(1, 0),
    "blocks.0.attn.b_Q": torch.zeros_like,
    "blocks.0.attn.b_K": lambda w: w.flip(0),
    "blocks.1.attn.b_V": torch.zeros_like,
    "blocks.1.attn.b_O": torch.zeros_like,
    "blocks.0.ln2.w": torch.ones_like,
    "blocks.1.ln2.b": torch.zeros_like,
    "blocks.0.mlp.W_in": lambda w: w.roll(1, 1),
    "blocks.1.mlp.W_out": lambda w: w.bfloat16().float(),
    "blocks.0.mlp.b_in": torch.zeros_like,
    "blocks.1.mlp.b_out": torch.zeros_like,
    "ln_final.w": torch.ones_like,
    "ln_final.b": torch.zeros_like,
    "unembed.b_U": torch.ones_like,
}
