"""Faults in the embeddings of tokens and positions."""

import math

import torch

from clean_transformer.modules.embed import Embed
from clean_transformer.modules.pos_embed import PosEmbed
from clean_transformer.parity.faults.semantic.edits import (
    SemanticFault,
    arguments,
    edited,
    result,
    without,
)

EMBEDDING_FAULTS = (
    SemanticFault(
        "tokens-shifted",
        "each position reads the token before it",
        "hook_embed",
        arguments(Embed, lambda tokens: tokens.roll(1, -1)),
    ),
    SemanticFault(
        "token-ids-off-by-one",
        "each token reads the next row of the embedding",
        "hook_embed",
        edited(Embed, {"W_E": lambda W_E: W_E.roll(-1, 0)}),
    ),
    SemanticFault(
        "embedding-scaled",
        "the embedding is multiplied by √d_model, as in Vaswani et al. 2017",
        "hook_embed",
        result(Embed, lambda embed: embed * math.sqrt(embed.shape[-1])),
    ),
    SemanticFault(
        "positions-shifted",
        "positions count from 1",
        "hook_pos_embed",
        edited(PosEmbed, {"W_pos": lambda W_pos: W_pos.roll(-1, 0)}),
    ),
    SemanticFault(
        "positions-late",
        "every position but the first reads the row before its own",
        "hook_pos_embed",
        edited(PosEmbed, {"W_pos": lambda W_pos: torch.cat([W_pos[:1], W_pos[:-1]])}),
    ),
    SemanticFault(
        "positions-missing",
        "no position is added",
        "hook_pos_embed",
        edited(PosEmbed, without("W_pos")),
    ),
    SemanticFault(
        "positions-constant",
        "every position is the first",
        "hook_pos_embed",
        edited(PosEmbed, {"W_pos": lambda W_pos: W_pos[:1].expand_as(W_pos)}),
    ),
    SemanticFault(
        "positions-reversed",
        "positions count from the last token back",
        "hook_pos_embed",
        result(PosEmbed, lambda pos_embed: pos_embed.flip(1)),
    ),
)
