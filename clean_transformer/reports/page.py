"""What the reports have in common: plain values for JSON, and pages that need nothing else."""

import math
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_page(template: str, **context: Any) -> str:
    """The page that a template of `templates/` makes: one file, without a network."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["number"] = number
    return environment.get_template(template).render(context)


def number(value: int | float | str, digits: int = 3) -> str:
    """A number to read, also one that is none."""
    value = float(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{'−' if value < 0 else ''}∞"
    return f"{float(f'{value:.{digits}g}'):g}"
