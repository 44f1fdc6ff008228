"""Judges the outputs of a part of the model: element by element, or row by row."""

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
    """Judge each row of `got` by its RMS error / the RMS change that random rounding causes in it.

    A row is a slice along the last axis. `envelope` has the mean square change of each row. `u` is
    the unit roundoff. Rows in which the mask `judged` is False are ignored. Returns a row for the
    report, and a mask of the rows that fail.
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
    row = Isolated(
        name=name,
        case=use.case,
        path="use",
        operation=PART.name,
        ratio=float(ratios.max()),
        healthy=healthy,
        wrong=wrong,
        rms_ratio=float(ratios.square().mean().sqrt()),
        bits=-math.log2(largest) if largest else math.inf,
        worst_index=index_of_largest(ratios),
    )
    return row, ratios > healthy


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
    """Judge each element of |got − exact| by the limits of `kind` for a sum of `terms` terms.

    `scale` is G. `u` is the unit roundoff; None means that of the dtype of `got`. Returns a row for
    the report, and a mask of the elements that fail.
    """
    u = UNIT_ROUNDOFF[got.dtype] if u is None else u
    healthy, wrong = kind.limits(terms, u)
    error = torch.where(got == exact, 0.0, (got.double() - exact).abs())
    ratios = error_ratios(error, scale, u, got.dtype)
    rms = float(ratios.square().mean().sqrt())
    row = Isolated(
        name=name,
        case=use.case,
        path="use",
        operation=kind.name,
        ratio=float(ratios.max()),
        healthy=healthy,
        wrong=wrong,
        rms_ratio=rms,
        bits=-math.log2(rms * u) if rms else math.inf,
        worst_index=index_of_largest(ratios),
    )
    return row, ratios > healthy


def first_position(wrong: Tensor) -> int:
    """The first position at which `wrong` [batch pos …] is True for any text or element.

    The result is 0 if `wrong` is False everywhere.
    """
    positions = wrong.transpose(0, 1).flatten(start_dim=1).any(dim=1).nonzero()
    return int(positions[0]) if len(positions) else 0
