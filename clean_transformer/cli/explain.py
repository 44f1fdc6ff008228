"""The command `clean-transformer explain`."""

from pathlib import Path
from typing import Annotated

import typer

from clean_transformer.cli import options
from clean_transformer.cli.terminal import progress, read_text


def explain(
    html: Annotated[Path, typer.Option(help="Write the page here.")],
    text: options.Text = None,
    file: options.TextFile = None,
    weights: options.Weights = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
) -> None:
    """Write an HTML page that shows predictions, attention patterns and logit lens for a text.

    Exit status: 0 = done, 2 = could not run, 130 = interrupted.
    """
    read = read_text(text, file)

    from clean_transformer.analysis.text_page import explain, write_html
    from clean_transformer.cli.loading import read_model
    from clean_transformer.support.files import require_folder

    require_folder(html)
    with progress() as on_step:
        on_step("reading the weights")
        model = read_model(weights, device, dtype)
        on_step("running the model")
        write_html(explain(model, read), html)
    print(f"wrote {html}")
