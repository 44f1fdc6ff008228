"""Compares two runs: says which work of our own contestants became slower or faster.

Between two runs, the whole machine may become slower, because it is warmer, or because other
programs run. We call this the machine's drift. The peers show the drift. Peers are contestants that
do not run our code, and whose package has the same version in both runs. A part is a contestant and
its work, and the change of a part is its new time divided by its old time. We divide the change of
each of our parts by the median change of the peers in the same measurement, and compare the
quotient with the noise. We estimate the noise in two ways, from the differences between the peers'
changes, and from the differences between the rounds of our part, and use the larger estimate. Bytes
do not depend on the machine's speed, so we do not divide changes of bytes by the peers' changes.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from clean_transformer.benchmark.contestants import OURS
from clean_transformer.benchmark.results.data import Result, Results
from clean_transformer.benchmark.work import BYTES, Part

# A change up to this size on a log scale (about 5 %) always counts as "the same".
LEAST = 0.05

# A change counts as "slower" or "faster" if it is larger than this many standard deviations of the
# noise. With 2 instead of 4, about 3 in 100 unchanged parts would count as changed, by chance.
SIGMAS = 4


@dataclass(frozen=True)
class Change:
    """How the time or the memory of one contestant changed between two runs, for the same work.

    `measurement` is the title of the measurement. `part` names the contestant and its work.
    `factor` is the new time divided by the old time. It is corrected: if the whole machine became
    slower, `factor` does not change. For memory, `factor` is the new number of bytes divided by the
    old number. `noise` is the largest change that may be noise, on a log scale: 0.05 is about 5 %.
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


@dataclass(frozen=True)
class Missing:
    """The work of one contestant that only one of two runs measured.

    `measurement` is the title of the measurement. `part` names the contestant and its work. `why`
    says which run did not measure it. `failed` is True if one of our contestants was measured
    before, and the later run tried to measure it and could not.
    """

    measurement: str
    part: Part
    why: str
    failed: bool


def missing(before: Results, after: Results) -> list[Missing]:
    """Return what only one of the two runs measured."""
    old, new = (
        {(row.measurement, row.part): row for row in run.results} for run in (before, after)
    )
    found = []
    for key in {**old, **new}:
        for run, name, other in ((new, "later", old), (old, "earlier", new)):
            here, there = run.get(key), other.get(key)
            if there is None or not there.values or (here is not None and here.values):
                continue
            why = f"not measured in the {name} run" + (f": {here.why}" if here is not None else "")
            failed = here is not None and run is new and there.part.setup.contestant in OURS
            found.append(Missing(*key, why, failed))
    return found


def compare(before: Results, after: Results) -> tuple[float | None, list[Change]]:
    """Return the drift between two runs, and a `Change` for every `Work` of our contestants.

    The drift says how much slower the whole machine became. It is the median of the factors by
    which the times of other libraries changed, or None if both runs have no such time. Raises
    `ValueError` if the runs have no measurement in common.
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
    all_peers = [each for group in peers.values() for each in group]
    return math.exp(_median(all_peers)) if all_peers else None, changes


def _factor(before: Result, after: Result) -> float:
    return after.spread.median / before.spread.median


def _noise(result: Result) -> float:
    """Return the standard error of the median of the result's values, on a log scale."""
    logs = [math.log(value) for value in result.values]
    # The standard error of a median is √(π/2) ≈ 1.25 times the standard error of a mean.
    return 1.25 * statistics.pstdev(logs) / math.sqrt(max(1, len(logs) - 1))


def _from_the_others(changes: Sequence[float]) -> list[float]:
    """Return each change minus the median of the other changes; [] if there is only one change."""
    others = [[*changes[:i], *changes[i + 1 :]] for i in range(len(changes))]
    return [each - _median(rest) for each, rest in zip(changes, others, strict=True) if rest]


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def _deviation(distances: Sequence[float]) -> float:
    """Estimate the standard deviation of values from their distances to the center.

    For normal noise, the standard deviation is 1.4826 times the median of the absolute distances.
    Outliers hardly change this median.
    """
    return 1.4826 * _median([abs(each) for each in distances])
