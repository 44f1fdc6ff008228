"""Makes HTML from the templates in `templates/`: pages, and cells of notebooks.

A page is one file, which browsers can show without a network.
"""

import html
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


def framed(page: str) -> str:
    """Return HTML that shows a whole page in a cell of a notebook, inside a frame.

    The frame separates the page's styles and scripts from those of the notebook and other cells.
    """
    style = "width: 100%; height: 480px; border: 0"
    # In a notebook that you have not run yourself, Jupyter shows this text instead of the frame.
    instead = "Run this cell to see the page. Jupyter shows pages only of cells that you have run."
    return f'<iframe srcdoc="{html.escape(page)}" style="{style}">{instead}</iframe>'


def number(value: int | float, digits: int = 3) -> str:
    """Format a number for people, including NaN and infinity.

    `digits` is the number of significant digits.
    """
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{'−' if value < 0 else ''}∞"
    return f"{float(f'{value:.{digits}g}'):g}"


def in_words(names: list[str]) -> str:
    """Return a text that lists `names`. More than three are shortened: "a, b, … z (26)"."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, … {names[-1]} ({len(names)})"
