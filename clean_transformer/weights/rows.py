"""Defines `Row`, which describes the name and layout of one parameter in a checkpoint format."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from clean_transformer.config import Config

AXIS = r"[a-z]\w*"  # matches the name of an axis in an einops pattern, but not an axis of length 1


@dataclass(frozen=True)
class Row:
    """Describes in which tensor, and with which axes, a format stores one parameter.

    "Our" parameters have this package's names and axes, and "their" tensors have the names and axes
    of the checkpoint format. `ours` is our name of the parameter. `theirs` is the name of their
    tensor that holds the parameter. If the format does not store the parameter, `theirs` is None,
    and we set the parameter to zeros.

    `pattern` is the einops pattern that turns their tensor into our parameter. If `pattern` is
    None, their tensor has the same axes as our parameter. Their tensor may also hold several of our
    parameters, such as W_Q, W_K and W_V. Then `pattern` turns their tensor into a stack of our
    parameters along a new axis 0, and `part` is the index of this row's parameter on axis 0. If
    their tensor holds only one parameter, `part` is None.
    """

    ours: str
    theirs: str | None
    pattern: str | None = None
    part: int | None = None

    def their_axes(self, our_axes: str) -> list[str]:
        """Return the axes of their tensor, in order.

        `our_axes` are the axes of our parameter, for example "head d_head". If the format merges
        axes into one, the merged axis is one entry of the result: "(head d_head)".
        """
        return re.findall(r"\([^)]*\)|\w+", (self.pattern or our_axes).split("->")[0])

    def their_shape(self, our_axes: str, cfg: Config) -> tuple[int, ...]:
        """Return the shape of their tensor. `our_axes` are the axes of our parameter."""
        lengths = _axis_lengths(cfg)
        return tuple(
            math.prod(lengths[axis] for axis in re.findall(AXIS, group))
            for group in self.their_axes(our_axes)
        )

    def read(self, tensor: Tensor, cfg: Config) -> Tensor:
        """Return our parameter, as a view of `tensor`, which is their tensor."""
        if self.pattern is None:
            return tensor
        ours = rearrange(tensor, self.pattern, **self._lengths(cfg))
        return ours if self.part is None else ours[self.part]

    def write(self, tensor: Tensor, cfg: Config) -> Tensor:
        """Return their tensor, computed from `tensor`, which is our parameter.

        If their tensor holds several of our parameters, `tensor` must be the stack of these
        parameters along a new axis 0. Each parameter's index on this axis is the `part` of its
        `Row`.
        """
        if self.pattern is None:
            return tensor
        theirs, ours = self.pattern.split("->")
        return rearrange(tensor, f"{ours} -> {theirs}", **self._lengths(cfg))

    def _lengths(self, cfg: Config) -> dict[str, int]:
        """Return the length of each axis in the pattern, as keyword arguments for einops."""
        lengths = _axis_lengths(cfg)
        return {axis: lengths[axis] for axis in re.findall(AXIS, str(self.pattern))}


def write_rows(rows: Iterable[tuple[Row, Tensor]], cfg: Config) -> Tensor:
    """Return one tensor of a checkpoint format, computed from parameters of this package.

    `rows` has one pair for each parameter that the tensor holds: the parameter's `Row`, and the
    parameter itself. The pairs can be in any order. The result is contiguous.
    """
    (row, tensor), *others = sorted(rows, key=lambda pair: pair[0].part or 0)
    if row.part is not None:
        tensor = torch.stack([tensor, *(part for _, part in others)])
    return row.write(tensor, cfg).contiguous()


def _axis_lengths(cfg: Config) -> dict[str, int]:
    return cfg.axes() | {"qkv": 3}
