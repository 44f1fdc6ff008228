"""Loads the model that the option `--weights` names."""

from collections.abc import Callable
from typing import TypeVar

from clean_transformer.cli.terminal import print_message
from clean_transformer.model import DemoTransformer
from clean_transformer.support.dtypes import choose_dtype
from clean_transformer.text.tokenizer import Tokenizer
from clean_transformer.weights.hub import HubError

Read = TypeVar("Read")


def read_model(
    weights: str | None, device: str, dtype: str, tokenizer: str | None = None
) -> DemoTransformer:
    """Load the model that `weights` names, and its tokenizer.

    The tokenizer is loaded before the weights, so that a missing tokenizer is reported at once. If
    `weights` is None, `read_or_demo` chooses the model.
    """
    exact = choose_dtype(dtype)

    def read(source: str) -> DemoTransformer:
        read_tokenizer = Tokenizer.from_pretrained(tokenizer or source)
        model = DemoTransformer.from_pretrained(source, device=device, dtype=exact)
        model.tokenizer = read_tokenizer
        return model

    return read_or_demo(read, weights)


def read_or_demo(read: Callable[[str], Read], weights: str | None) -> Read:
    """Return the result of `read(weights)`.

    If `weights` is None, return the result of `read("gpt2")` instead. If "gpt2" cannot be
    downloaded, print a note on standard error, and return the result of `read("demo")`, so that the
    command also works without a network.
    """
    if weights is not None:
        return read(weights)
    try:
        return read("gpt2")
    except HubError:
        print_message(
            "note: gpt2 cannot be downloaded (--weights gpt2 says why); this is demo, which only "
            "knows stories that begin with 'Once upon a time'",
            style="yellow",
        )
        return read("demo")
