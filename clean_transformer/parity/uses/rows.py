"""Judges a tensor that the device computed: each element (`elementwise`) or each row (`by_rows`).

A row of a tensor is a slice along its last axis, such as the output [d_model] at one position.
"""

import math

import torch
from torch import Tensor

from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.limits import PART, Kind, error_ratios, index_of_largest
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, smallest_kept
from clean_transformer.parity.uses.table import Use


def by_rows(
    name: str,
    use: Use,
    got: Tensor,
    exact: Tensor,
    envelope: Tensor,
    u: float,
    judged: Tensor | None = None,
) -> tuple[Isolated, Tensor]:
    """Judge each row of `got`, the device's result. A row is a slice along the last axis.

    The error ratio of a row is its root mean square error, divided by the root mean square change
    that random rounding causes in the row (see `parity/rounding.py`). The limits of this ratio are
    those of `PART`. `exact` is the right result in float64. `envelope` has the mean square change
    of each row. `u` is the unit roundoff of the device's dtype. Rows in which the mask `judged` is
    False are ignored.

    Returns the judgment, and a mask that is True for each row that does not pass.
    """
    healthy, wrong = PART.limits(1, u)
    error = (got.double() - exact).square().mean(dim=-1).sqrt()
    ratios = torch.where(error == 0, 0.0, error / (envelope.sqrt() + smallest_kept(got.dtype)))
    size = exact.square().mean(dim=-1).sqrt()
    relative = torch.where(error == 0, 0.0, error / size)
    if judged is not None:
        ratios, relative = ratios.where(judged, 0.0), relative.where(judged, 0.0)
    ratios = ratios.nan_to_num(math.inf, math.inf)
    largest = float(relative.nan_to_num(math.inf, math.inf).max())
    return _row(name, use, PART, ratios, (healthy, wrong), largest), ratios > healthy


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
    """Judge each element of `got`, the device's result, by its error ratio.

    `parity/limits.py` explains the error ratio, its scale G (`scale`), and its limits (`kind`).
    `exact` is the right result in float64. `terms` is the number of terms that the operation adds
    up for one element. `u` is the unit roundoff; None means the unit roundoff of the dtype of
    `got`.

    Returns the judgment, and a mask that is True for each element that does not pass.
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
    """Return the judgment of all `ratios`. `relative` is the relative error that gives `bits`."""
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
