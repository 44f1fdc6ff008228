"""A parity report as JSON."""

from pathlib import Path
from typing import Any

from clean_transformer.parity.results import SuiteReport
from clean_transformer.reports.plain import plain, write_plain

SCHEMA = "clean-transformer/parity"

# Another number means that a key was renamed or removed.
SCHEMA_VERSION = 1


def to_json(report: SuiteReport) -> dict[str, Any]:
    """The whole report, with every verdict, as values that JSON has."""
    return {"schema": SCHEMA, "version": SCHEMA_VERSION, **plain(report)}


def write_json(report: SuiteReport, file: Path) -> None:
    """Write the report as JSON. An error leaves the file as it was."""
    write_plain(to_json(report), file)
