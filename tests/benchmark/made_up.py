"""Made-up numbers: no test here measures anything."""

from clean_transformer.benchmark.results.results import Result, Results
from clean_transformer.benchmark.work import Entrant, Part, Work

WORK = Work(kind="forward", batch=2, length=10)


def part(contestant: str, dtype: str = "float32", work: Work = WORK) -> Part:
    return Part(Entrant(contestant=contestant, dtype=dtype), work)


def result(of: Part, *values: float, why: str = "", measurement: str = "forward") -> Result:
    return Result(measurement, of, of.entrant.contestant, values, why)


def results(*rows: Result) -> Results:
    return Results({"torch": "2"}, rows)
