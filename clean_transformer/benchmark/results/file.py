"""The JSON file of a run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clean_transformer.benchmark.judge import Judged
from clean_transformer.benchmark.results.results import SCHEMA, VERSION, Result, Results
from clean_transformer.support.files import write_atomically


def write_results(results: Results, judged: Sequence[Judged], file: Path) -> None:
    """Write everything as JSON, whole or not at all."""
    values = {
        "schema": SCHEMA,
        "version": VERSION,
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
    write_atomically(file, json.dumps(values, indent=1, allow_nan=False) + "\n")


def _derived(results: Results, result: Result) -> dict[str, Any]:
    if not result.values:
        return {}
    share = results.share_of_limit(result)
    return {
        "median": result.spread.median,
        "tokens_per_second": result.tokens_per_second if result.part.work.tokens else None,
        "share_of_limit": None if share is None else share.median,
    }
