"""The command `clean-transformer explain`."""

from pathlib import Path
from typing import Annotated

import typer

from clean_transformer.cli import options
from clean_transformer.cli.terminal import print_written, progress, read_text

# The first text of --serve, if none is given. Every model knows how to continue it.
FIRST_TEXT = "Once upon a time"


def explain(
    text: options.Text = None,
    file: options.TextFile = None,
    html: Annotated[Path | None, typer.Option(help="Write the page here.")] = None,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve",
            help="Serve the page at http://127.0.0.1, with a form for other texts, until Ctrl-C.",
        ),
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port of --serve; 0 takes a free one.")
    ] = 8000,
    weights: options.Weights = None,
    tokenizer: options.Tokenizer = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
) -> None:
    """Make an HTML page that shows a text's predictions, attention patterns and logit lens.

    Exit status: 0 = done, 2 = could not run, 130 = interrupted.
    """
    if serve == (html is not None):
        raise ValueError("give either --html FILE, to write the page, or --serve, to look at it")
    read = FIRST_TEXT if serve and text is None and file is None else read_text(text, file)

    from clean_transformer.analysis.text_page import explain, render, write_html
    from clean_transformer.cli.loading import read_model
    from clean_transformer.cli.serving import PageServer
    from clean_transformer.support.files import require_folder

    require_folder(html)
    with progress() as on_step:
        on_step("reading the weights")
        model = read_model(weights, device, dtype, tokenizer)
        on_step("running the model")
        explanation = explain(model, read)
        if html is not None:
            write_html(explanation, html)
    if html is not None:
        return print_written(html)

    def page(asked: str, error: str) -> str:
        return render(explain(model, asked), form=asked, error=error)

    with PageServer(page, read, port) as server:
        print(f"serving http://{server.hosts[0]}/ until Ctrl-C", flush=True)
        server.serve_forever()
