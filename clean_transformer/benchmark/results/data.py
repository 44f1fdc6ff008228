"""The results of a run, as plain data."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from clean_transformer.benchmark.running.timing import Spread
from clean_transformer.benchmark.work import Part


@dataclass(frozen=True)
class Result:
    """The values of one part, one a round, in seconds or bytes; or why there are none.

    `title` is the contestant's package and version. `kl_divergence` is, in nats, that of its next
    tokens from ours in float32; None if it gives no logits.
    """

    measurement: str
    part: Part
    title: str
    values: Sequence[float]
    why: str = ""
    kl_divergence: float | None = None

    @property
    def spread(self) -> Spread:
        """Median and quartiles over the rounds."""
        return Spread.of(self.values)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second in the median round."""
        return self.part.work.tokens / self.spread.median


@dataclass(frozen=True)
class Results:
    """All results of a run, and the environment that it ran in."""

    environment: Mapping[str, str]
    results: Sequence[Result]

    def by_measurement(self) -> Iterator[Mapping[Part, Result]]:
        """The results of each measurement, by part."""
        for title in dict.fromkeys(result.measurement for result in self.results):
            yield {r.part: r for r in self.results if r.measurement == title}

    def together(self, parts: Collection[Part]) -> Mapping[Part, Result] | None:
        """The measurement in which all these parts took turns; None if there is none."""
        return next((one for one in self.by_measurement() if one.keys() >= {*parts}), None)

    def limit_of(self, result: Result) -> Result | None:
        """The machine's limit for the same work in the same measurement; None if not measured."""
        limit = result.part.by("limit")
        found = [r for r in self.results if r.part == limit and r.measurement == result.measurement]
        return found[0] if found and found[0].values else None

    def share_of_limit(self, result: Result) -> Spread | None:
        """The limit's time divided by this result's, round by round; None without a limit."""
        limit = self.limit_of(result)
        if limit is None or result.part.setup.contestant == "limit":
            return None
        pairs = zip(limit.values, result.values, strict=True)
        return Spread.of([least / value for least, value in pairs])
