"""Chooses the weights and the input tokens with which the parity suite runs a model."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.weights.hub import HubError, fetch
from clean_transformer.weights.load import FILES, WEIGHTS, read_pretrained
from clean_transformer.weights.refusals import WeightsError
from clean_transformer.weights.synthetic import plain, stress
from clean_transformer.weights.table import State

Tokens = Int[Tensor, "batch pos"]


@dataclass(frozen=True)
class Weights:
    """The model's parameters in float32.

    `title` says where the weights come from, `cfg` is the model's configuration, and `state` maps
    our parameter names to tensors. `folder` is the folder from which our loader read the weights.
    It is None for synthetic weights and for weights in a single file.

    Raises `WeightsError` if a parameter has NaN or infinity.
    """

    title: str
    cfg: Config
    state: State
    folder: Path | None = None

    def __post_init__(self) -> None:
        """Raise `WeightsError` if a weight is NaN or infinite."""
        for name, weight in self.state.items():
            bad = weight.numel() - int(weight.isfinite().sum())
            if bad:
                raise WeightsError(
                    f"{self.title} cannot be checked: {name} has {bad} of {weight.numel()} numbers "
                    "that are NaN or infinite"
                )


# The sequence length of the suite's tokens, unless `n_ctx` is smaller. The length is just above a
# power of two, where many kernels switch to another algorithm.
LENGTH = 33


def spread_ids(cfg: Config, batch: int, length: int) -> Int[Tensor, "batch pos"]:
    """Return token ids [batch length] that are spread over the vocabulary.

    The ids are the multiples of 7919, a prime number, modulo `d_vocab`.
    """
    return (torch.arange(batch * length) * 7919 % cfg.d_vocab).reshape(batch, length)


def suite_tokens(cfg: Config, batch: int = 2, length: int = LENGTH) -> Int[Tensor, "batch pos"]:
    """Return token ids [batch length] that are spread over the vocabulary.

    If `cfg.n_ctx` is smaller than `length`, the texts have `cfg.n_ctx` tokens. Each text starts
    with the last id of the vocabulary, which is <|endoftext|> in GPT-2. The first text also has
    this id in the middle. The last text ends with the id 0.
    """
    tokens = spread_ids(cfg, batch, min(length, cfg.n_ctx))
    tokens[:, 0] = tokens[0, tokens.shape[1] // 2] = cfg.d_vocab - 1
    if tokens.shape[1] > 1:
        tokens[-1, -1] = 0
    return tokens


# The functions that make synthetic weights, by name.
SYNTHETIC = {"stress": stress, "plain": plain}


def choose_weights(source: str | None) -> Weights:
    """Load weights from a hub id, an alias, a folder or a file, or make synthetic weights.

    The sources "stress" and "plain" make synthetic weights in the shape of GPT-2 small. A suffix
    chooses another size: "stress:medium". If `source` is None, the weights are those of GPT-2
    small, from the Hugging Face hub or from its local cache. If the hub cannot be reached, they are
    "stress" weights in the shape of GPT-2 small.

    Raises `HubError` if `source` is given but the hub cannot provide it, and `WeightsError` if a
    parameter has NaN or infinity.
    """
    kind, _, size = (source or "").partition(":")
    if kind in SYNTHETIC:
        cfg = Config.gpt2(size or "small")
        title = f"synthetic {kind!r} weights of GPT-2 {size or 'small'}'s shape"
        return Weights(title, cfg, SYNTHETIC[kind](cfg))
    try:
        path = Path(source or "gpt2")
        in_file = path.is_file() or (path.suffix in FILES and not path.is_dir())
        folder = None if in_file else fetch(source or "gpt2", WEIGHTS)
        cfg, state = read_pretrained(folder or source or "", torch.device("cpu"), torch.float32)
        return Weights(f"the weights of {source or 'gpt2'}", cfg, state, folder)
    except HubError:
        if source:
            raise
        synthetic = choose_weights("stress")
        why = "because gpt2 cannot be downloaded (--weights gpt2 says why)"
        return replace(synthetic, title=f"{synthetic.title}, {why}")
