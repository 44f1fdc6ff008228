"""What got slower from one run to another, beyond the noise.

Two runs differ by more than their rounds tell: the machine is warmer, or its neighbors are busier.
Contestants that are not ours have the same code in both runs, so that they show it: their middle
change in a measurement is taken for the machine's and divided out of our times there, and what they
scatter by around it is noise, or what the rounds of a part scatter by where that is more. Bytes
know of neither.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from clean_transformer.benchmark.results.results import Result, Results
from clean_transformer.benchmark.work import BYTES, Part

OURS = ("ours", "optimized", "optimized compiled", "compiled", "watched")


LEAST = 0.05  # a smaller change is never reported


SIGMAS = 4  # of noise: with a hundred parts, three would come by chance


@dataclass(frozen=True)
class Change:
    """How the time of one part changed, as a factor, and how much of that noise can be."""

    measurement: str
    part: Part
    factor: float
    noise: float

    @property
    def verdict(self) -> str:
        """slower, faster, or the same."""
        if abs(math.log(self.factor)) <= self.noise:
            return "the same"
        return "slower" if self.factor > 1 else "faster"


def compare(before: Results, after: Results) -> tuple[float, list[Change]]:
    """The machine's own change, and that of everything of ours beyond it.

    Raises `ValueError` where the runs have nothing in common.
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
        same = one.part.entrant.contestant not in OURS and one.title == other.title
        if same and one.part.work.kind not in BYTES:
            peers[one.measurement].append(math.log(_factor(one, other)))
    scatter = _deviation([each for group in peers.values() for each in _beside_others(group)])
    changes = []
    for one, other in pairs:
        if one.part.entrant.contestant in OURS:
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
    # That of a median is √(π/2) times that of a mean.
    return 1.25 * statistics.pstdev(logs) / math.sqrt(max(1, len(logs) - 1))


def _beside_others(changes: Sequence[float]) -> list[float]:
    """Each less the middle one of the rest, of those that have others beside them."""
    rests = [[*changes[:i], *changes[i + 1 :]] for i in range(len(changes))]
    return [each - _median(rest) for each, rest in zip(changes, rests, strict=True) if rest]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _deviation(distances: Sequence[float]) -> float:
    """The standard deviation as the median distance tells it, which no outlier can spoil."""
    return 1.4826 * _median([abs(each) for each in distances])
