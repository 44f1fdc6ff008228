"""Loads the tokens to train on, and cuts them into windows of n_ctx + 1 tokens."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.text.token_ids import token_ids
from clean_transformer.text.tokenizer import Tokenizer

Tokens = npt.NDArray[np.integer]


def as_array(tokens: Tokens | Tensor | Sequence[int]) -> Tokens:
    """Return token ids [pos] as a NumPy array. An array, also a memory-mapped one, is unchanged.

    Raises `TypeError` for anything but an array, a tensor or a list of ids, for example a text.
    """
    if isinstance(tokens, np.ndarray):
        return tokens
    if isinstance(tokens, str):
        raise TypeError("tokens are a text; give its ids, such as Tokenizer.encode(text)")
    return token_ids(tokens).cpu().numpy()


def load_tokens(file: Path) -> Tokens:
    """Return the array of token ids in a .npy file, memory-mapped.

    Raises `ValueError` for a file in another format.
    """
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except OSError:
        raise
    except Exception as error:  # NumPy evaluates the header, which can raise every kind
        raise ValueError(f"{file} is not a .npy file ({error}); write it with numpy.save") from None


def tokenize(files: Sequence[Path], tokenizer: Tokenizer) -> Tokens:
    """Return the token ids [pos] of UTF-8 text files, with <|endoftext|> before each file.

    Raises `ValueError` for a file that is not UTF-8.
    """
    ids: list[int] = []
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8")  # `read_text` would change \r\n into \n
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error}); convert it first") from None
        ids += tokenizer.to_tokens(text)[0].tolist()
    return np.array(ids, dtype=np.int32)


def fingerprint(tokens: Tokens) -> str:
    """Return a hash of the token ids, which does not depend on the dtype of the array."""
    hashed = hashlib.blake2b(digest_size=16)
    for first in range(0, len(tokens), 2**20):
        hashed.update(tokens[first : first + 2**20].astype("<u4").tobytes())
    return hashed.hexdigest()


def refuse_tokens(name: str, tokens: Tokens, cfg: Config) -> None:
    """Raise `ValueError` if a model with the architecture `cfg` cannot train on `tokens`.

    `tokens` must be an integer array [pos] of ids in the vocabulary, with enough tokens for one
    window. The error message begins with `name`, which describes the tokens, for example "the
    held-out tokens".
    """
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
    """Return the `length` + 1 token ids of window number `number` of a training run.

    The first `length` tokens are the input of the model. The last token is only a target. `number`
    counts the windows of the whole run, from 0. Each epoch has every window once, in random order,
    and may cut the tokens at other places than the previous epoch. The result depends only on the
    arguments. A resumed run therefore reads the same windows, even with another number of
    processes.
    """
    per_epoch, left = divmod(len(tokens) - 1, length)
    epoch, place = divmod(number, per_epoch)
    order, first = _epoch(seed, epoch, per_epoch, left)
    start = first + int(order[place]) * length
    return torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))


@lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, windows: int, left: int) -> tuple[Tokens, int]:
    """Return a random order of an epoch's windows, and the index of the first window's first token.

    The order is an array of the numbers from 0 to `windows` − 1. `windows` is the number of windows
    in an epoch. The windows do not cover all tokens: `left` tokens remain. Some of them, a random
    number from 0 to `left`, are before the first window, and the others are after the last window.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    return generator.permutation(windows), int(generator.integers(left, endpoint=True))
