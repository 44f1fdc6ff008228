"""Compares a tensor from the device with the exact tensor, element by element or row by row.

A row of a tensor is a slice along its last axis, such as the output [d_model] at one position.
"""

import math

import torch
from torch import Tensor

from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.limits import Kind, error_ratios, index_of_largest
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, smallest_kept
from clean_transformer.parity.uses.table import Use


def by_rows(
    name: str,
    use: Use,
    got: Tensor,
    exact: Tensor,
    envelope: Tensor,
    kind: Kind,
    u: float,
    judged: Tensor | None = None,
) -> tuple[Isolated, Tensor]:
    """Compare each row of `got`, the device's result, with `exact`, the same result in float64.

    A row is a slice along the last axis. The error ratio of a row is its root mean square error,
    divided by the root mean square change that random rounding causes in the row (see
    `parity/rounding.py`). `envelope` has the mean square of this change for each row. It is
    averaged with a typical value: the median over the rows of envelope / (row's mean square), times
    the row's mean square. `kind` has the limits of the ratio. `u` is the unit roundoff of the
    device's dtype. If the mask `judged` is given, only the rows where it is True are compared.

    Returns the result, and a mask that is True for each row that does not pass.
    """
    healthy, wrong = kind.limits(1, u)
    error = (got.double() - exact).square().mean(dim=-1).sqrt()
    squares = exact.square().mean(dim=-1)
    # A few elements can cause nearly all of a row's error. By chance, a single random run can move
    # these elements by very little. So half of the envelope is what is usual for a row of its size.
    judged = (torch.tensor(True) if judged is None else judged).expand_as(envelope)
    usual = (envelope / squares)[judged].nanmedian()
    envelope = (envelope + squares * usual.nan_to_num()) / 2
    ratios = torch.where(error == 0, 0.0, error / (envelope.sqrt() + smallest_kept(got.dtype)))
    relative = torch.where(error == 0, 0.0, error / squares.sqrt())
    relative = relative.where(judged, 0.0)
    ratios = ratios.where(judged, 0.0).nan_to_num(math.inf, math.inf)
    largest = float(relative.nan_to_num(math.inf, math.inf).max())
    return _row(name, use, kind, ratios, (healthy, wrong), largest), ratios > healthy


def elementwise(
    name: str,
    use: Use,
    got: Tensor,
    exact: Tensor,
    scale: Tensor,
    kind: Kind,
    terms: int = 1,
    u: float | None = None,
) -> tuple[Isolated, Tensor]:
    """Compare each element of `got`, the device's result, with `exact`, the same result in float64.

    The error of an element is divided by the error of one rounding, which is about `u` · `scale`
    (see `parity/limits.py`). `u` is the unit roundoff, by default that of the dtype of `got`.
    `scale` has one number for each element. For a sum in float32, this number is the sum of the
    absolute values of the terms. `terms` is the number of terms. `kind` is the kind of operation.

    Returns the result, and a mask that is True for each element that does not pass.
    """
    u = UNIT_ROUNDOFF[got.dtype] if u is None else u
    healthy, wrong = kind.limits(terms, u)
    error = torch.where(got == exact, 0.0, (got.double() - exact).abs())
    ratios = error_ratios(error, scale, u, got.dtype)
    relative = u * float(ratios.square().mean().sqrt())
    return _row(name, use, kind, ratios, (healthy, wrong), relative), ratios > healthy


def _row(
    name: str, use: Use, kind: Kind, ratios: Tensor, limits: tuple[float, float], relative: float
) -> Isolated:
    """Return the result for error `ratios`. Its effective precision `bits` is −log₂ `relative`."""
    healthy, wrong = limits
    return Isolated(
        name=name,
        case=use.case,
        path="use",
        operation=kind.name,
        ratio=float(ratios.max()),
        healthy=healthy,
        wrong=wrong,
        rms_ratio=float(ratios.square().mean().sqrt()),
        bits=-math.log2(relative) if relative else math.inf,
        worst_index=index_of_largest(ratios),
    )


def first_position(wrong: Tensor) -> int:
    """Return the first position at which any element of the mask `wrong` [batch pos …] is True.

    Returns 0 if `wrong` is False everywhere.
    """
    positions = wrong.transpose(0, 1).flatten(start_dim=1).any(dim=1).nonzero()
    return int(positions[0]) if len(positions) else 0
