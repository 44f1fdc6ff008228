"""Made-up numbers: no test here measures anything."""

from clean_transformer.benchmark.results.data import Result, Results
from clean_transformer.benchmark.work import Part, Setup, Work

WORK = Work(kind="forward", batch=2, length=10)


def part(contestant: str, dtype: str = "float32", work: Work = WORK) -> Part:
    return Part(Setup(contestant=contestant, dtype=dtype), work)


def result(of: Part, *values: float, why: str = "", measurement: str = "forward") -> Result:
    return Result(measurement, of, of.setup.contestant, [*map(float, values)], why)


def results(*rows: Result) -> Results:
    return Results({"torch": "2"}, rows)
