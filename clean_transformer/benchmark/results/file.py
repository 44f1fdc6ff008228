"""Writes and reads the results of a run as JSON. `benchmark/README.md` lists the keys."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clean_transformer.benchmark.judgment import Judged
from clean_transformer.benchmark.results.data import Result, Results
from clean_transformer.benchmark.work import Part, Setup, Work
from clean_transformer.reports.plain import Schema, write_plain

SCHEMA = Schema("clean-transformer/bench", version=2)


def write_results(results: Results, judged: Sequence[Judged], file: Path) -> None:
    """Write results and judged goals to `file` as JSON.

    If an error occurs, `file` keeps its old content.
    """
    values = {
        "schema": SCHEMA.name,
        "version": SCHEMA.version,
        "environment": dict(results.environment),
        "results": [asdict(result) | _derived(results, result) for result in results.results],
        "goals": [
            {
                "device": one.goal.device,
                "what": one.goal.what,
                "at_least": one.goal.at_least,
                "at_most": one.goal.at_most,
                "measured": None if one.measured is None else one.measured.median,
                "verdict": one.verdict,
                "note": one.note,
            }
            for one in judged
        ],
    }
    write_plain(values, file)


def read_results(file: Path) -> Results:
    """Return the results in a file that `write_results` wrote.

    Raises `ValueError` for any other file, and for a file of another version of the schema.
    """
    values = SCHEMA.read(file)
    results = [
        Result(
            row["measurement"],
            Part(Setup(**row["part"]["setup"]), Work(**row["part"]["work"])),
            row["title"],
            [float(value) for value in row["values"]],
            row["why"],
            row["kl_divergence"],
        )
        for row in values["results"]
    ]
    return Results(values["environment"], results)


def _derived(results: Results, result: Result) -> dict[str, Any]:
    if not result.values:
        return {}
    share = results.share_of_limit(result)
    return {
        "median": result.spread.median,
        "tokens_per_second": result.tokens_per_second if result.part.work.tokens else None,
        "share_of_limit": None if share is None else share.median,
    }
