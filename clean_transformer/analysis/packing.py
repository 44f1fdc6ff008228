"""Packs attention weights into short strings, so that a page with 1024 tokens stays small.

Most attention weights of a long text are almost 0. A packed head lists only the others: for each of
them, the number of zeros before it, and the weight. Numbers are written as in source maps: in a
digit, 5 bits belong to the number, and the sixth bit says that more digits of the number follow.
"""

import string

import torch
from jaxtyping import Float, Int
from torch import Tensor

DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"

_CODES = torch.tensor([*DIGITS.encode()], dtype=torch.uint8)


def refuse_nan(computed: Tensor) -> None:
    """Raise `ValueError` if a tensor that the model computed has NaN."""
    if computed.isnan().any():
        raise ValueError(
            "the model computes NaN for this text; run `clean-transformer doctor` to see "
            "whether the device is faulty, and otherwise check the weights"
        )


def triangle(pattern: Float[Tensor, "head query key"]) -> Int[Tensor, "head pair"]:
    """Return the attention weights of each head, multiplied by 1000 and rounded.

    The row of a head has the weight of query 0 for key 0, then the two weights of query 1 for the
    keys 0 and 1, and so on. Raises `ValueError` for NaN.
    """
    refuse_nan(pattern)
    query, key = torch.tril_indices(pattern.shape[1], pattern.shape[2])
    return (1000 * pattern.detach().cpu()[:, query, key].float()).round().to(torch.int16)


def pack(weights: Int[Tensor, "head pair"], step: int) -> list[str]:
    """Return one string for each head. The weights are rounded to multiples of `step`."""
    return [_pack_head(head, step) for head in weights]


def _pack_head(weights: Int[Tensor, "pair"], step: int) -> str:
    rounded = (weights.long() + step // 2) // step
    places = rounded.nonzero().squeeze(1)
    zeros_before = places.diff(prepend=torch.tensor([-1])) - 1
    numbers = torch.stack([zeros_before, rounded[places]], dim=1).flatten()[:, None]
    shifts = torch.tensor([0, 5, 10, 15, 20])
    rest = numbers >> shifts
    digits = (rest & 31) + 32 * (rest >= 32)
    needed = (rest > 0) | (shifts == 0)
    return bytes(_CODES[digits[needed]].tolist()).decode()
