"""TODO reports/plain."""

import json
import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from clean_transformer.support.files import write_atomically


def plain(value: Any) -> Any:
    """A report's dataclasses as values that JSON has, with what follows from their fields."""
    if is_dataclass(value) and not isinstance(value, type):
        fields = {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
        derived = ("verdict", "rho", "coverage")
        return fields | {
            name: plain(getattr(value, name)) for name in derived if hasattr(value, name)
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no inf and no nan
    return value


def write_plain(values: Mapping[str, Any], file: Path) -> None:
    """Write plain values as JSON, whole or not at all."""
    write_atomically(file, json.dumps(values, indent=1, allow_nan=False) + "\n")
