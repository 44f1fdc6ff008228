"""`Row`: the name and the layout of one parameter in a checkpoint format.

Here and in `table`, "our" names and tensors are this package's, and "their" names and tensors are
those of the checkpoint format.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from clean_transformer.config import Config

AXIS = r"[a-z]\w*"  # an axis name in an einops pattern; the axis "1" does not match


@dataclass(frozen=True)
class Row:
    """Where and how a format stores one of our parameters.

    `ours` is our name of the parameter. `theirs` is the name of their tensor that holds it. If the
    format does not store the parameter, `theirs` is None and the parameter is zero.

    `pattern` is the einops pattern that turns their tensor into our parameter. Without a pattern,
    both have the same axes. If their tensor holds several of our parameters, such as queries, keys
    and values, the pattern stacks them along a new first axis. `part` is then the index of our
    parameter on that axis.
    """

    ours: str
    theirs: str | None
    pattern: str | None = None
    part: int | None = None

    def their_axes(self, our_axes: str) -> list[str]:
        """Return the axes of their tensor. Axes that they merge are one entry, "(head d_head)"."""
        return re.findall(r"\([^)]*\)|\w+", (self.pattern or our_axes).split("->")[0])

    def their_shape(self, our_axes: str, cfg: Config) -> tuple[int, ...]:
        """Return the shape of their tensor, given the axes of our parameter."""
        lengths = _axis_lengths(cfg)
        return tuple(
            math.prod(lengths[axis] for axis in re.findall(AXIS, group))
            for group in self.their_axes(our_axes)
        )

    def read(self, tensor: Tensor, cfg: Config) -> Tensor:
        """Return our parameter, as a view of their tensor."""
        if self.pattern is None:
            return tensor
        ours = rearrange(tensor, self.pattern, **self._lengths(cfg))
        return ours if self.part is None else ours[self.part]

    def write(self, tensor: Tensor, cfg: Config) -> Tensor:
        """Return their tensor, given our parameter.

        If their tensor holds several of our parameters, `tensor` is these parameters, stacked along
        a new first axis.
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
    """Return their tensor, contiguous, given all of our parameters that it holds.

    `rows` holds the row and the value of each parameter.
    """
    (row, tensor), *others = sorted(rows, key=lambda pair: pair[0].part or 0)
    if row.part is not None:
        tensor = torch.stack([tensor, *(part for _, part in others)])
    return row.write(tensor, cfg).contiguous()


def _axis_lengths(cfg: Config) -> dict[str, int]:
    return cfg.axes() | {"qkv": 3}
