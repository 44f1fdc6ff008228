"""Compare two runs: which of our parts became slower or faster by more than the noise?

Between two runs the whole machine may have become slower, because it is warmer, or shared with
others. The contestants of other libraries (the peers) show this, because their code is the same in
both runs. We divide our change by the median change of the peers in the same measurement. The noise
is how far the peers' changes scatter around that median, or how far the part's own rounds scatter,
whichever is larger. Bytes do not depend on the machine's speed, so we compare them directly.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from clean_transformer.benchmark.contestants import OURS
from clean_transformer.benchmark.results.data import Result, Results
from clean_transformer.benchmark.work import BYTES, Part

LEAST = 0.05  # a smaller change, on a log scale, counts as "the same"

# A change counts if it exceeds this many standard deviations of the noise. With two, three of a
# hundred parts would exceed them by chance.
SIGMAS = 4


@dataclass(frozen=True)
class Change:
    """How one part changed.

    `factor` is its new time, or bytes, divided by its old one. For times, the machine's drift is
    removed. `noise` is the largest change that may be noise, on a log scale: 0.05 is about 5 %.
    """

    measurement: str
    part: Part
    factor: float
    noise: float

    @property
    def verdict(self) -> str:
        """ "slower", "faster", or "the same" if the change is within the noise."""
        if abs(math.log(self.factor)) <= self.noise:
            return "the same"
        return "slower" if self.factor > 1 else "faster"


def compare(before: Results, after: Results) -> tuple[float, list[Change]]:
    """Compare two runs, and return the machine's drift and the change of each part of ours.

    The drift is the median factor by which the peers' times changed.

    Raises `ValueError` if the runs have no measurement in common.
    """
    old = {(row.measurement, row.part): row for row in before.results if row.values}
    pairs = [
        (old[row.measurement, row.part], row)
        for row in after.results
        if row.values and (row.measurement, row.part) in old
    ]
    if not pairs:
        raise ValueError("the two runs have no measurement in common; use the same options")
    peers: dict[str, list[float]] = {one.measurement: [] for one, _ in pairs}
    for one, other in pairs:
        same_code = one.part.setup.contestant not in OURS and one.title == other.title
        if same_code and one.part.work.kind not in BYTES:
            peers[one.measurement].append(math.log(_factor(one, other)))
    scatter = _deviation([each for group in peers.values() for each in _from_the_others(group)])
    changes = []
    for one, other in pairs:
        if one.part.setup.contestant in OURS:
            factor, noise = _factor(one, other), LEAST
            if one.part.work.kind not in BYTES:
                factor /= math.exp(_median(peers[one.measurement]))
                own = math.hypot(_noise(one), _noise(other))
                noise = max(LEAST, SIGMAS * max(own, scatter))
            changes.append(Change(one.measurement, one.part, factor, noise))
    return math.exp(_median([each for group in peers.values() for each in group])), changes


def _factor(before: Result, after: Result) -> float:
    return after.spread.median / before.spread.median


def _noise(result: Result) -> float:
    """The standard error of the median of the rounds, on a log scale."""
    logs = [math.log(value) for value in result.values]
    # The standard error of a median is √(π/2) ≈ 1.25 times that of a mean.
    return 1.25 * statistics.pstdev(logs) / math.sqrt(max(1, len(logs) - 1))


def _from_the_others(changes: Sequence[float]) -> list[float]:
    """How far each change is from the median of the other changes; empty for a single change."""
    others = [[*changes[:i], *changes[i + 1 :]] for i in range(len(changes))]
    return [each - _median(rest) for each, rest in zip(changes, others, strict=True) if rest]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _deviation(distances: Sequence[float]) -> float:
    """Estimate a standard deviation from the median distance, which outliers hardly affect."""
    return 1.4826 * _median([abs(each) for each in distances])
