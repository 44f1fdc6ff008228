"""Makes HTML pages from the templates in `templates/`.

A page is one file, which browsers can show without a network.
"""

import math
from typing import Any


def render_page(template: str, **context: Any) -> str:
    """Return the page: the file `templates/<template>`, filled with the values in `context`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

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


def number(value: int | float, digits: int = 3) -> str:
    """Format a number for people, including NaN and infinity.

    `digits` is the number of significant digits.
    """
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{'−' if value < 0 else ''}∞"
    return f"{float(f'{value:.{digits}g}'):g}"
