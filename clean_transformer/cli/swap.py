"""The command `clean-transformer swap`."""

from typing import TYPE_CHECKING, Annotated
from warnings import catch_warnings, simplefilter

import typer

from clean_transformer.cli import options
from clean_transformer.cli.terminal import open_console, print_written, progress, read_text

if TYPE_CHECKING:
    from torch import Tensor

    from clean_transformer.parity.inputs import Weights


def swap(
    text: Annotated[
        str | None,
        typer.Argument(
            help="The text; with '-', standard input is read. Default: token ids spread over the "
            "vocabulary."
        ),
    ] = None,
    file: options.TextFile = None,
    *,
    module: Annotated[
        str,
        typer.Option(
            help="Which modules to replace: embed, blocks.3.attn, 'blocks.[3-7].mlp', 'blocks.*', …"
        ),
    ],
    with_: Annotated[
        str,
        typer.Option(
            "--with",
            help="What to put there: variants.NAME, or FILE.py:NAME for a class or function of "
            "yours. The class is called with the Config, the function with the old module and its "
            "path.",
        ),
    ],
    weights: options.WeightsOrSynthetic = None,
    tokenizer: options.Tokenizer = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    json: options.JsonFile = None,
    html: options.HtmlFile = None,
) -> None:
    """Replace modules of a model, and show how much every activation and the predictions change.

    Exit status: 0 = done, 2 = could not run, 130 = interrupted.
    """
    from clean_transformer.cli.loading import read_or_demo
    from clean_transformer.model import DemoTransformer
    from clean_transformer.parity.inputs import SYNTHETIC, choose_weights, suite_tokens
    from clean_transformer.support.devices import resolve_device
    from clean_transformer.support.dtypes import choose_dtype
    from clean_transformer.support.files import STANDARD_OUTPUT, require_folder
    from clean_transformer.swapping.effect_report import print_effect, write_html, write_json
    from clean_transformer.swapping.effects import effect
    from clean_transformer.swapping.from_name import chosen_make
    from clean_transformer.swapping.loading import WeightsNotCopied
    from clean_transformer.swapping.swaps import HookPointsLost, LooksAhead, swap
    from clean_transformer.text.tokenizer import Tokenizer

    require_folder(json, html)
    if tokenizer is not None and text is None and file is None:
        raise ValueError("--tokenizer is for a text; give one, or leave --tokenizer out")
    passage = None if text is None and file is None else read_text(text, file)

    def read_with_text(source: str) -> "tuple[Weights, Tensor]":
        tokens_from = "gpt2" if source.partition(":")[0] in SYNTHETIC else source
        assert passage is not None
        reader = Tokenizer.from_pretrained(tokenizer or tokens_from)
        return choose_weights(source), reader.to_tokens(passage)

    with chosen_make(with_) as make:
        chosen_device, chosen_dtype = resolve_device(device), choose_dtype(dtype)
        with progress() as on_step:
            on_step("reading the weights")
            if passage is None:
                chosen, read = choose_weights(weights), "ids spread over the vocabulary"
                tokens = suite_tokens(chosen.cfg)
            else:
                chosen, tokens = read_or_demo(read_with_text, weights)
                read = repr(passage)
            model = DemoTransformer.from_state_dict(chosen.state, chosen.cfg)
            model.to(chosen_device, chosen_dtype)
            on_step("running the original and the swapped model")
            with catch_warnings():
                for told_in_the_report in (HookPointsLost, WeightsNotCopied, LooksAhead):
                    simplefilter("ignore", told_in_the_report)
                swapped = swap(model, module, make)
            report = effect(model, swapped, tokens.to(chosen_device), f"{chosen.title}; on {read}")
        try:
            if json is not None:
                write_json(report, json)
            if html is not None:
                write_html(report, html)
        finally:  # a full disk does not hide the result
            print_effect(report, open_console(stderr=json == STANDARD_OUTPUT))
        print_written(json, html)
