"""Tokens to train on, and which of them each step reads."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.text.tokenizer import Tokenizer

Tokens = npt.NDArray[np.integer]


def load_tokens(file: Path) -> Tokens:
    """The token ids in a .npy file, such as uint16 or int32, memory-mapped.

    Raises `ValueError` for a file of anything else.
    """
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is no .npy file ({error}); write it with numpy.save") from None


def tokenize(files: Sequence[Path], tokenizer: Tokenizer) -> Tokens:
    """The token ids of UTF-8 text files, an <|endoftext|> before each.

    Raises `ValueError` for a file that is not UTF-8.
    """
    ids: list[int] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}); convert it first") from None
        ids += tokenizer.to_tokens(text)[0].tolist()
    return np.array(ids, dtype=np.int32)


def refuse_tokens(name: str, tokens: Tokens, cfg: Config) -> None:
    """Raise `ValueError` for tokens that the model cannot read, or too few for one window."""
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{name} are {tokens.dtype} of shape {[*tokens.shape]}; they must be integers [pos]"
        )
    if len(tokens) < cfg.n_ctx + 1:
        raise ValueError(
            f"{name} are {len(tokens)}; a window of n_ctx={cfg.n_ctx} and the token after it need "
            f"{cfg.n_ctx + 1}: give more text, or train with a smaller n_ctx"
        )
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= cfg.d_vocab:
        raise ValueError(
            f"{name} have ids from {lowest} to {highest}; this model's vocabulary has 0 to "
            f"{cfg.d_vocab - 1}: take the tokenizer's d_vocab, or its tokens"
        )


def window(tokens: Tokens, number: int, length: int, seed: int) -> Int[Tensor, "pos"]:
    """The window of that number in a run that reads every window once per epoch, shuffled.

    It is `length` tokens and the one after them. A pure function of its arguments: a run that
    goes on later, or on another number of processes, needs to know no more than its step.
    """
    per_epoch, left = divmod(len(tokens) - 1, length)
    epoch, place = divmod(number, per_epoch)
    order, first = _epoch(seed, epoch, per_epoch, left)
    start = first + int(order[place]) * length
    return torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, windows: int, left: int) -> tuple[Tokens, int]:
    """The order of an epoch's windows, and where the first begins: `left` tokens are left over."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    return generator.permutation(windows), int(generator.integers(left, endpoint=True))
