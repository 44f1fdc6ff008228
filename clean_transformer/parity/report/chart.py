"""Computes a line chart of the error in the residual stream, from the first to the last block."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from clean_transformer.parity.results import DeviceRun


@dataclass(frozen=True)
class Curve:
    """One line of the chart.

    `label` is the text for the line in the legend. `style` is the CSS class of the line. `values`
    has one error for each activation on the horizontal axis.
    """

    label: str
    style: str
    values: list[float]


@dataclass(frozen=True)
class Chart:
    """A line chart of root mean square errors, with a logarithmic vertical axis.

    `names` has the names of the activations on the horizontal axis. `curves` has the lines of the
    chart. `allowed` has, for each activation, the largest error that passes. `decades` has the
    exponents of the powers of ten on the vertical axis. `width` and `height` are the size of the
    chart, and `left`, `top` and `bottom` are its margins, all in SVG units.
    """

    names: list[str]
    curves: list[Curve]
    allowed: list[float]
    decades: range
    width: int = 1060
    height: int = 300
    left: int = 52
    top: int = 10
    bottom: int = 38

    @property
    def step(self) -> float:
        """The horizontal distance between neighboring activations, in SVG units."""
        return (self.width - self.left) / len(self.names)

    def x(self, index: int | float) -> float:
        """The distance of `names[index]` from the left edge of the chart, in SVG units."""
        return self.left + (index + 0.5) * self.step

    def y(self, value: float) -> float:
        """The distance of the error `value` from the top edge of the chart, in SVG units.

        The error 0 is at the lower end of the vertical axis. NaN and infinity are at the upper end.
        """
        low, high = self.decades[0], self.decades[-1]
        depth = low if value == 0 else high if math.isnan(value) else math.log10(value)
        share = (min(max(depth, low), high) - low) / (high - low)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def line(self, values: Iterable[float]) -> str:
        """The `points` attribute of the SVG polyline for `values`, one error per activation."""
        return " ".join(f"{self.x(i):.1f},{self.y(value):.1f}" for i, value in enumerate(values))


def depth_chart(run: DeviceRun) -> Chart | None:
    """Return the line chart of one run's errors in the residual stream, or None.

    The result is None if the run did not measure these errors, or if all errors and limits are 0,
    infinite or NaN.
    """
    residual = [row for row in run.end_to_end if ".hook_resid_" in row.name]
    curves = [
        Curve("this device", "ours", [row.error for row in residual]),
        Curve("random rounding", "envelope", [row.envelope for row in residual]),
    ]
    theirs = [row.reference_error for row in residual if row.reference_error is not None]
    if residual and len(theirs) == len(residual):
        curves.append(Curve("the reference itself", "reference", theirs))
    allowed = [row.envelope * row.healthy for row in residual]
    drawn = [value for curve in curves for value in curve.values] + allowed
    logs = [math.log10(value) for value in drawn if 0 < value < math.inf]
    if not logs:
        return None
    low = math.floor(min(logs))
    decades = range(low, max(math.ceil(max(logs)), low + 1) + 1)
    return Chart([row.name for row in residual], curves, allowed, decades)
