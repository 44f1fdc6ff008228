"""What came out of a run, as it is kept in a file of JSON."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clean_transformer.benchmark.running.timing import Spread
from clean_transformer.benchmark.work import Entrant, Part, Work

SCHEMA, VERSION = "clean-transformer/bench", 1


@dataclass(frozen=True)
class Result:
    """The values of one part, seconds or bytes, a round each; or why there are none.

    `kl_divergence` is that of its next token from ours in float32, in nats, where it gives logits.
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
        """Of the median round."""
        return self.part.work.tokens / self.spread.median


@dataclass(frozen=True)
class Results:
    """A whole run: on what, and what came out."""

    environment: Mapping[str, str]
    results: Sequence[Result]

    def by_measurement(self) -> Iterator[Mapping[Part, Result]]:
        """What took turns, together."""
        for title in dict.fromkeys(result.measurement for result in self.results):
            yield {r.part: r for r in self.results if r.measurement == title}

    def together(self, parts: Collection[Part]) -> Mapping[Part, Result] | None:
        """The measurement in which all of these took turns."""
        return next((one for one in self.by_measurement() if one.keys() >= {*parts}), None)

    def limit_of(self, result: Result) -> Result | None:
        """What the machine can do at most of the same work, in the same rounds."""
        limit = result.part.by("limit")
        found = [r for r in self.results if r.part == limit and r.measurement == result.measurement]
        return found[0] if found and found[0].values else None

    def share_of_limit(self, result: Result) -> Spread | None:
        """How near it came to the limit, from 0 to 1, round by round."""
        limit = self.limit_of(result)
        if limit is None or result.part.entrant.contestant == "limit":
            return None
        pairs = zip(limit.values, result.values, strict=True)
        return Spread.of([least / value for least, value in pairs])


def read_results(file: Path) -> Results:
    """What `write_results` wrote. Raises `ValueError` for anything else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        told = (values["schema"], values["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no results of a benchmark ({error})") from None
    if told != (SCHEMA, VERSION):
        raise ValueError(
            f"{file} is {told[0]} version {told[1]}, not {SCHEMA} version {VERSION}; "
            "measure again with this version"
        )
    results = [
        Result(
            row["measurement"],
            Part(Entrant(**row["part"]["entrant"]), Work(**row["part"]["work"])),
            row["title"],
            row["values"],
            row["why"],
            row["kl_divergence"],
        )
        for row in values["results"]
    ]
    return Results(values["environment"], results)
