"""One row of a format's table: one of our parameters, and the tensor of theirs that holds it."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from clean_transformer.config import Config

AXIS = r"[a-z]\w*"  # the name of an axis in an einops pattern; the axis "1" has no name


@dataclass(frozen=True)
class Row:
    """Where a format keeps one of our parameters.

    `ours` and `theirs` are the two names. `theirs` is None if the format does not have the
    parameter; the parameter is then zero.

    `pattern` is the einops pattern from their tensor to ours. Without a pattern, both have the
    same axes. If their tensor holds several of our parameters, the result of the pattern has one
    more axis at the front, and `part` is our index along it.
    """

    ours: str
    theirs: str | None
    pattern: str | None = None
    part: int | None = None

    def their_axes(self, our_axes: str) -> list[str]:
        """The axes of their tensor. Several axes in brackets are merged into one."""
        return re.findall(r"\([^)]*\)|\w+", (self.pattern or our_axes).split("->")[0])

    def their_shape(self, our_axes: str, cfg: Config) -> tuple[int, ...]:
        """The shape of their tensor."""
        lengths = _axis_lengths(cfg)
        return tuple(
            math.prod(lengths[axis] for axis in re.findall(AXIS, group))
            for group in self.their_axes(our_axes)
        )

    def read(self, tensor: Tensor, cfg: Config) -> Tensor:
        """Our parameter, as a view of their tensor."""
        if self.pattern is None:
            return tensor
        ours = rearrange(tensor, self.pattern, **self._lengths(cfg))
        return ours if self.part is None else ours[self.part]

    def write(self, tensor: Tensor, cfg: Config) -> Tensor:
        """Their tensor. If it has several parts, `tensor` is the parts stacked at the front."""
        if self.pattern is None:
            return tensor
        theirs, ours = self.pattern.split("->")
        return rearrange(tensor, f"{ours} -> {theirs}", **self._lengths(cfg))

    def _lengths(self, cfg: Config) -> dict[str, int]:
        """The length of each axis in the pattern, as einops wants them."""
        lengths = _axis_lengths(cfg)
        return {axis: lengths[axis] for axis in re.findall(AXIS, str(self.pattern))}


def write_rows(rows: Iterable[tuple[Row, Tensor]], cfg: Config) -> Tensor:
    """The one tensor of theirs that holds all of these parameters of ours; contiguous."""
    (row, tensor), *others = sorted(rows, key=lambda pair: pair[0].part or 0)
    if row.part is not None:
        tensor = torch.stack([tensor, *(part for _, part in others)])
    return row.write(tensor, cfg).contiguous()


def _axis_lengths(cfg: Config) -> dict[str, int]:
    return cfg.axes() | {"qkv": 3}
