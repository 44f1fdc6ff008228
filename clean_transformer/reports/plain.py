"""Converts reports to JSON, and writes the JSON to files."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from clean_transformer.support.files import write_atomically
from clean_transformer.support.printable import printable

# If a dataclass has properties with these names, `plain` adds their values to the JSON.
DERIVED = ("verdict", "rho", "coverage", "first_failure", "by_use")


def plain(value: Any) -> Any:
    """Convert a value to dictionaries, lists, strings and numbers, which JSON can store.

    A dataclass becomes a dictionary of its fields and of some properties, such as "verdict". JSON
    has no infinity and no NaN, so these numbers become the strings "inf", "-inf" and "nan".
    """
    if is_dataclass(value) and not isinstance(value, type):
        fields = {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
        derived = [name for name in DERIVED if hasattr(value, name)]
        return fields | {name: plain(getattr(value, name)) for name in derived}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_plain(values: Mapping[str, Any], file: Path) -> None:
    """Write `values` to `file` as JSON. If writing fails, `file` keeps its old content."""
    write_atomically(file, json.dumps(values, indent=1, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Schema:
    """The name and the version of the format of one kind of JSON report.

    The version changes when a key of the format is renamed or removed.
    """

    name: str
    version: int

    def to_json(self, report: Any) -> dict[str, Any]:
        """Convert the dataclass `report` to JSON values; add this schema's name and version."""
        return {"schema": self.name, "version": self.version, **plain(report)}

    def write_json(self, report: Any, file: Path) -> None:
        """Write `report` to `file` as JSON. If writing fails, `file` keeps its old content."""
        write_plain(self.to_json(report), file)

    def read(self, file: Path) -> dict[str, Any]:
        """Read a report that has this format and version.

        Raises `ValueError` for any other file.
        """
        values = read_report(file)
        name, found = values["schema"], values["version"]
        if name != self.name:
            raise ValueError(f"{file} has the format {name}, not {self.name}")
        if found != self.version:
            age = "an older" if found < self.version else "a newer"
            raise ValueError(
                f"{file} was written by {age} clean_transformer: its format is {name} version "
                f"{found}, and this one reads version {self.version}; make the report again"
            )
        return values


def read_report(file: Path) -> dict[str, Any]:
    """Read a JSON report.

    The value of "schema" is the name of the report's format, and the value of "version" is the
    version of this format. Raises `ValueError` if the file is not JSON or lacks one of these keys.
    """
    try:
        values = _escaped(json.loads(file.read_text(encoding="utf-8")))
        well_formed = isinstance(values["schema"], str) and isinstance(values["version"], int)
    except (ValueError, KeyError, TypeError, RecursionError):
        well_formed = False
    if not well_formed:
        raise ValueError(f"{file} is no report that --json wrote")
    return values


def _escaped(value: Any) -> Any:
    """Return a JSON value with `printable` strings, which a terminal can show safely."""
    if isinstance(value, dict):
        return {printable(key): _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return printable(value) if isinstance(value, str) else value
