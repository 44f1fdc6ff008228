"""The command `clean-transformer tokens`."""

from typing import Annotated

import typer

from clean_transformer.cli import options
from clean_transformer.cli.terminal import print_json, print_table, read_text


def tokens(
    text: options.Text = None,
    file: options.TextFile = None,
    weights: options.Weights = None,
    bos: Annotated[
        bool, typer.Option(help="Begin with <|endoftext|>, as in every text that a model reads.")
    ] = True,
    as_json: options.PrintJson = False,
) -> None:
    """Show the tokens of a text.

    Exit status: 0 = done, 2 = could not run, 130 = interrupted.
    """
    read = read_text(text, file)

    from clean_transformer.cli.loading import read_or_demo
    from clean_transformer.text.symbols import visible
    from clean_transformer.text.tokenizer import Tokenizer

    tokenizer = read_or_demo(Tokenizer.from_pretrained, weights)
    ids = tokenizer.to_tokens(read, bos)[0].tolist()
    words = tokenizer.to_str_tokens(ids)
    if as_json:
        print_json(ids=ids, tokens=words)
    else:
        rows = [*zip(range(len(ids)), map(visible, words), ids, strict=True)]
        print_table(f"{len(ids)} tokens", ["position", "token", "id"], rows)
