"""The command `clean-transformer tokens`."""

from typing import Annotated

import typer

from clean_transformer.cli import options
from clean_transformer.cli.terminal import print_table, read_text, write_json
from clean_transformer.support.files import STANDARD_OUTPUT, require_folder


def tokens(
    text: options.Text = None,
    file: options.TextFile = None,
    weights: options.Weights = None,
    tokenizer: options.Tokenizer = None,
    bos: Annotated[
        bool, typer.Option(help="Begin with <|endoftext|>, as in every text that a model reads.")
    ] = True,
    json: options.JsonFile = None,
) -> None:
    """Show the tokens of a text.

    Exit status: 0 = done, 2 = could not run, 130 = interrupted.
    """
    if weights is not None and tokenizer is not None:
        raise ValueError("--weights and --tokenizer both name a tokenizer; leave one out")
    require_folder(json)
    read = read_text(text, file)

    from clean_transformer.cli.loading import read_or_demo
    from clean_transformer.text.symbols import visible
    from clean_transformer.text.tokenizer import Tokenizer

    chosen = read_or_demo(Tokenizer.from_pretrained, tokenizer or weights)
    ids = chosen.to_tokens(read, bos)[0].tolist()
    words = chosen.to_str_tokens(ids)
    if json is not None:
        write_json(json, ids=ids, tokens=words)
    if json != STANDARD_OUTPUT:
        rows = [*zip(range(len(ids)), map(visible, words), ids, strict=True)]
        print_table(f"{len(ids)} tokens", ["position", "token", "id"], rows)
