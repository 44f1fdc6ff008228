"""The weights, tokens and modes of a run, chosen by name."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.text.tokenizer import Tokenizer
from clean_transformer.weights.hub import HubError
from clean_transformer.weights.load import read_pretrained
from clean_transformer.weights.synthetic import plain, stress
from clean_transformer.weights.table import State


@dataclass(frozen=True)
class Weights:
    """The parameters of a run, by our names in float32; `title` says where they come from."""

    title: str
    cfg: Config
    state: State


# The length of the suite's main run: a model can be shorter. Kernels change near powers of two.
LENGTH = 33


def spread_ids(cfg: Config, batch: int, length: int) -> Int[Tensor, "batch pos"]:
    """Ids spread over the vocabulary: multiples of the 1,000th prime number, modulo its size."""
    return (torch.arange(batch * length) * 7919 % cfg.d_vocab).reshape(batch, length)


def suite_tokens(cfg: Config, batch: int = 2, length: int = LENGTH) -> Int[Tensor, "batch pos"]:
    """Ids spread over the vocabulary, of `n_ctx` positions at most.

    Each row starts with the last id, <|endoftext|> in GPT-2.
    """
    tokens = spread_ids(cfg, batch, min(length, cfg.n_ctx))
    tokens[:, 0] = cfg.d_vocab - 1
    return tokens


# Synthetic weights, with the vocabulary of GPT-2.
SYNTHETIC = {"stress": stress, "plain": plain}


def choose_weights(source: str | None) -> Weights:
    """The weights of a hub id, an alias, a folder or a file, or synthetic ones.

    Synthetic sources are "stress" and "plain", with a size if it is not small: "stress:medium".
    Without a source: GPT-2 small from the hub or its cache, or `stress` weights of its shape where
    the hub cannot be reached. Raises `HubError` for a named source that cannot be reached.
    """
    kind, _, size = (source or "").partition(":")
    if kind in SYNTHETIC:
        cfg = Config.gpt2(size or "small")
        title = f"synthetic {kind!r} weights of GPT-2 {size or 'small'}'s shape"
        return Weights(title, cfg, SYNTHETIC[kind](cfg))
    try:
        cfg, state = read_pretrained(source or "gpt2", torch.device("cpu"), torch.float32)
        return Weights(f"the weights of {source or 'gpt2'}", cfg, state)
    except HubError as error:
        if source:
            raise
        synthetic = choose_weights("stress")
        return replace(synthetic, title=f"{synthetic.title}, because {error}")


def choose_tokens(
    text: str | None, source: str | None, cfg: Config
) -> tuple[Int[Tensor, "batch pos"], str]:
    """The text as token ids, and a description of them.

    The tokenizer comes with the weights; synthetic weights use GPT-2's. Without a text or without
    a tokenizer, the ids are `suite_tokens`, and the description says why.
    """
    spread = suite_tokens(cfg)
    if text is None:
        return spread, "ids spread over the vocabulary"
    source = source or "gpt2"
    try:
        kind = source.partition(":")[0]
        tokenizer = Tokenizer.from_pretrained("gpt2" if kind in SYNTHETIC else source)
    except (ValueError, OSError) as error:
        return spread, f"ids spread over the vocabulary, not on the text, because {error}"
    return tokenizer.to_tokens(text), repr(text)
