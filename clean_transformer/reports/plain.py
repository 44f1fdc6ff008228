"""Reports as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import is_dataclass
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
