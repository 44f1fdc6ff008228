"""Reports as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from clean_transformer.support.files import write_atomically

# The properties that a JSON report states beside the fields.
DERIVED = ("verdict", "rho", "coverage", "first_failure")


def plain(value: Any) -> Any:
    """The value made of dictionaries, lists, strings and numbers, as JSON has them.

    A dataclass becomes a dictionary of its fields and of those `DERIVED` properties that it has.
    Infinity and NaN, which JSON lacks, become the strings "inf", "-inf" and "nan".
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
    """Write the values as JSON. An error leaves the file as it was."""
    write_atomically(file, json.dumps(values, indent=1, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Schema:
    """The name and the version of a kind of JSON report.

    Another version means that a key was renamed or removed.
    """

    name: str
    version: int

    def to_json(self, report: Any) -> dict[str, Any]:
        """The whole report, a dataclass, as values that JSON has."""
        return {"schema": self.name, "version": self.version, **plain(report)}

    def write_json(self, report: Any, file: Path) -> None:
        """Write the report as JSON. An error leaves the file as it was."""
        write_plain(self.to_json(report), file)
