"""Classes for the results of a run."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from clean_transformer.benchmark.running.timing import Spread
from clean_transformer.benchmark.work import Part, Setup, Work


@dataclass(frozen=True)
class Result:
    """The values that one measurement gave for one contestant and its work.

    - `measurement`: the title of the measurement.
    - `part`: the contestant and its work.
    - `title`: the contestant's package and version.
    - `values`: one value per round, in seconds or bytes; empty if nothing was measured.
    - `why`: why there are no values, or "".
    - `kl_divergence`: how much the contestant's predictions of the next token differ from our
      model's predictions in float32: the mean KL(ours ‖ contestant), in nats. None if no logits of
      the contestant were checked.
    """

    measurement: str
    part: Part
    title: str
    values: Sequence[float]
    why: str = ""
    kl_divergence: float | None = None

    @property
    def spread(self) -> Spread:
        """The median and the quartiles of `values`."""
        return Spread.of(self.values)

    @property
    def tokens_per_second(self) -> float:
        """`Work.tokens` divided by the median time in seconds."""
        return self.part.work.tokens / self.spread.median


@dataclass(frozen=True)
class Results:
    """All results of a run. `environment` describes the machine and the software."""

    environment: Mapping[str, str]
    results: Sequence[Result]

    def by_measurement(self) -> Iterator[Mapping[Part, Result]]:
        """Yield a dictionary for each measurement: the keys are parts, the values are results.

        A part is a contestant and its work.
        """
        for title in dict.fromkeys(result.measurement for result in self.results):
            yield {r.part: r for r in self.results if r.measurement == title}

    def together(self, parts: Collection[Part]) -> Mapping[Part, Result] | None:
        """Return the results of the first measurement that contains all `parts`.

        A part is a contestant and its work. The keys of the result are parts. Returns None if no
        measurement contains all `parts`.
        """
        return next((one for one in self.by_measurement() if one.keys() >= {*parts}), None)

    def limit_of(self, result: Result) -> Result | None:
        """Return the result of the contestant "limit" for the same work as `result`.

        The two results have the same measurement, work, device, dtype and model. Returns None if
        "limit" was not measured.
        """
        limit = result.part.by("limit")
        found = [r for r in self.results if r.part == limit and r.measurement == result.measurement]
        return found[0] if found and found[0].values else None

    def memory_of(self, setup: Setup) -> Result | None:
        """Return the result with the peak memory of `setup`. None if it was not measured."""
        memory = Part(setup, Work(kind="memory"))
        return next((r for r in self.results if r.part == memory and r.values), None)

    def share_of_limit(self, result: Result) -> Spread | None:
        """Return the value of the contestant "limit" divided by the value of `result`.

        Both have one value for each round of measurements. The values of the same round give a
        quotient, and the `Spread` has the median and the quartiles of the quotients. Returns None
        if "limit" was not measured, or if `result` belongs to "limit".
        """
        limit = self.limit_of(result)
        if limit is None or result.part.setup.contestant == "limit":
            return None
        pairs = zip(limit.values, result.values, strict=True)
        return Spread.of([least / value for least, value in pairs])
