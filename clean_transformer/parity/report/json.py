"""TODO parity/report/json."""

from pathlib import Path
from typing import Any

from clean_transformer.parity.results import SuiteReport
from clean_transformer.reports.plain import plain, write_plain

SCHEMA = "clean-transformer/parity"


SCHEMA_VERSION = 1


def to_json(report: SuiteReport) -> dict[str, Any]:
    """The whole report as plain values, with every verdict; see `SCHEMA_VERSION`."""
    return {"schema": SCHEMA, "version": SCHEMA_VERSION, **plain(report)}


def write_json(report: SuiteReport, file: Path) -> None:
    """Write the report, whole or not at all."""
    write_plain(to_json(report), file)
