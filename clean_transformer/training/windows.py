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
    """Return the token ids in a .npy file, memory-mapped.

    Raises `ValueError` for a file in another format.
    """
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is not a .npy file ({error}); write it with numpy.save") from None


def tokenize(files: Sequence[Path], tokenizer: Tokenizer) -> Tokens:
    """Return the token ids of UTF-8 text files, with <|endoftext|> before each file.

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
            f"{name} are only {len(tokens)}; one window of n_ctx={cfg.n_ctx} and the token after "
            f"it need {cfg.n_ctx + 1}: give more text, or train with a smaller n_ctx"
        )
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= cfg.d_vocab:
        raise ValueError(
            f"{name} have ids from {lowest} to {highest}; this model's vocabulary has ids 0 to "
            f"{cfg.d_vocab - 1}: set d_vocab to the tokenizer's, or use this model's tokenizer"
        )


def window(tokens: Tokens, number: int, length: int, seed: int) -> Int[Tensor, "pos"]:
    """Return window `number` of a run: `length` tokens and the one after them.

    Each epoch reads every window once, in a new random order. The window depends on nothing but the
    arguments, so that a resumed run, or one on another number of processes, reads the same ones.
    """
    per_epoch, left = divmod(len(tokens) - 1, length)
    epoch, place = divmod(number, per_epoch)
    order, first = _epoch(seed, epoch, per_epoch, left)
    start = first + int(order[place]) * length
    return torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, windows: int, left: int) -> tuple[Tokens, int]:
    """Return the order of an epoch's windows, and where the first window starts.

    The windows do not cover all tokens: `left` tokens are left over, at both ends together.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    return generator.permutation(windows), int(generator.integers(left, endpoint=True))
