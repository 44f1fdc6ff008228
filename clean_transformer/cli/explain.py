"""TODO cli/explain."""

from pathlib import Path
from typing import Annotated

import typer

from clean_transformer.cli import text as cli_text
from clean_transformer.cli.terminal import one_line_errors, progress, read_text


def explain(
    html: Annotated[Path, typer.Option(help="Write the page here.")],
    text: cli_text.TextArgument = None,
    file: cli_text.FileOption = None,
    weights: cli_text.WeightsOption = None,
    device: cli_text.DeviceOption = "auto",
    dtype: cli_text.DtypeOption = "float32",
) -> None:
    """Show on one page what a model makes of a text: predictions, attention, layer by layer."""
    from clean_transformer.analysis.text_page import explain, write_html
    from clean_transformer.support.files import require_folder

    with one_line_errors():
        require_folder(html)
        read = read_text(text, file)
        with progress() as on_step:
            on_step("reading the weights")
            model = cli_text.load(weights, device, dtype)
            on_step("reading the text")
            write_html(explain(model, read), html)
        print(f"wrote {html}")
