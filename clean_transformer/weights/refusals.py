"""Defines `WeightsError`, and functions that raise it for weights that no GPT-2 can have."""

import re
from collections.abc import Mapping
from reprlib import repr as shorten

import torch
from torch import Tensor

from clean_transformer.config import Config

# What to do about a damaged file.
AGAIN = "copy or download it again"

# The dtypes that weights can have. Integers under a weight's name are not weights.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class WeightsError(ValueError):
    """A checkpoint could not be read, or a format cannot store a model.

    Control characters in the message are escaped, and words of 1,000 characters or more are
    shortened, because they may come from a malicious file.
    """

    def __init__(self, message: str) -> None:
        printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        # Names between two slashes of a path are never so long.
        super().__init__(re.sub(r"([^\s/]{500})[^\s/]{500,}", r"\1…", printable))


def refuse_other_kinds(tensors: Mapping[str, Tensor]) -> None:
    """Raise `WeightsError` unless all tensors are dense and have a floating-point dtype.

    `DTYPES` lists the allowed dtypes.
    """
    others = [
        f"{key} is {'quantized' if tensor.is_quantized else tensor.dtype}"
        + (f" in the layout {tensor.layout}" if tensor.layout != torch.strided else "")
        for key, tensor in tensors.items()
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided
    ]
    if others:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise WeightsError(f"weights must be dense tensors of {names}; {'; '.join(others)}")


def refuse_unreal(tensors: Mapping[str, Tensor]) -> None:
    """Raise `WeightsError` if a tensor contains NaN or infinity, or is larger than its storage."""
    for key, tensor in tensors.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise WeightsError(f"{key} claims {tensor.numel()} elements, more than the file holds")
    for key, tensor in tensors.items():
        # A finite sum has finite terms. Only a sum that overflows needs the slow test.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise WeightsError(
                f"{key} contains NaN or infinity; to load it anyway, pass what torch.load or "
                "safetensors returns to from_state_dict"
            )


def refuse_differences(
    problem: str, wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `WeightsError` if tensors are missing, unused, or of the wrong shape.

    `wanted` maps the key of every necessary tensor to its shape. `given` maps the key of every
    tensor in the checkpoint to its shape. The error begins with `problem` and lists all
    differences.
    """
    wrong = [
        f"{key} {given[key]} instead of {shape}"
        for key, shape in wanted.items()
        if key in given and given[key] != shape
    ]
    differences = {
        "missing": [key for key in wanted if key not in given],
        "unused": [key for key in given if key not in wanted],
        "of the wrong shape": wrong,
    }
    if any(differences.values()):
        lists = (f"{kind}: {', '.join(keys)}" for kind, keys in differences.items() if keys)
        raise WeightsError(f"{problem}; {'; '.join(lists)}")


def refuse_architecture(name: str, cfg: Config) -> None:
    """Raise `WeightsError` for an architecture that the files of a plain GPT-2 cannot describe.

    Such files cannot describe folded LayerNorms (`normalization_type` is not "LN"), or a model in
    which n_heads × d_head is not d_model. `name` is the name of the format in the error.
    """
    if cfg.normalization_type != "LN":
        raise WeightsError(f"the {name} format has no place for folded LayerNorms")
    if cfg.n_heads * cfg.d_head != cfg.d_model:
        raise WeightsError(
            f"the {name} format needs n_heads × d_head = d_model, "
            f"not {cfg.n_heads} × {cfg.d_head} = {cfg.d_model}"
        )


def head_width(file: str, d_model: object, n_heads: object) -> int:
    """Return d_model / n_heads, which is the d_head of a plain GPT-2.

    Raises `WeightsError` if n_heads does not divide d_model, or if a number is not a positive
    integer. The error names `file`.
    """
    if not (type(d_model) is type(n_heads) is int and d_model > 0 < n_heads):
        numbers = f"{shorten(d_model)} and {shorten(n_heads)}"
        raise WeightsError(f"{file}: n_embd and n_head must be positive integers, not {numbers}")
    if d_model % n_heads:
        raise WeightsError(f"{file}: n_embd {d_model} is not a multiple of {n_heads} heads")
    return d_model // n_heads
