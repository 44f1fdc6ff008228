"""`token_ids`: turns lists and arrays of token ids into a tensor."""

from reprlib import repr as shorten

import torch
from jaxtyping import Int
from torch import Tensor


def are_known(ids: Int[Tensor, "..."]) -> bool:
    """Return whether the values of `ids` can be read.

    They cannot be read on the device "meta", nor while `torch.export` records a graph.
    """
    # Older versions of PyTorch lack `is_exporting`.
    return not (ids.is_meta or getattr(torch.compiler, "is_exporting", bool)())


def token_ids(tokens: object) -> Int[Tensor, "..."]:
    """Return the token ids `tokens` as a tensor of the same shape. A tensor is returned unchanged.

    `tokens` can be an int, a list of ints, a list of equally long lists of ints, a NumPy array or a
    tensor. Raises `TypeError` for anything else, and for ids that are not integers.
    """
    try:
        # Without a device, a list would go to PyTorch's default device, which may be another.
        ids = tokens if isinstance(tokens, Tensor) else torch.as_tensor(tokens, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            "token ids must be a tensor, an array, or equally long lists of ids, not "
            f"{shorten(tokens)}; a text is a str, and several texts are a list of str"
        ) from None
    if ids.numel() == 0 and not isinstance(tokens, Tensor):
        return ids.long()  # PyTorch makes a float tensor from an empty list
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise TypeError(f"token ids must be integers, not {ids.dtype}")
    return ids
