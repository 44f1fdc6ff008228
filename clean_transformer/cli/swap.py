"""The command `clean-transformer swap`."""

from typing import Annotated
from warnings import catch_warnings, simplefilter

import typer
from rich.console import Console

from clean_transformer.cli import options
from clean_transformer.cli.terminal import progress


def swap(
    text: Annotated[
        str | None,
        typer.Argument(help="The text. Default: token ids spread over the vocabulary."),
    ] = None,
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
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    json: options.JsonFile = None,
    html: options.HtmlFile = None,
) -> None:
    """Replace modules of a model, and show how much every activation and the predictions change.

    Exit status: 0 = done, 2 = could not run, 130 = interrupted.
    """
    from clean_transformer.model import DemoTransformer
    from clean_transformer.parity.inputs import choose_tokens, choose_weights
    from clean_transformer.support.devices import resolve_device
    from clean_transformer.support.dtypes import choose_dtype
    from clean_transformer.support.files import require_folder
    from clean_transformer.swapping.effect_report import print_effect, write_html, write_json
    from clean_transformer.swapping.effects import effect
    from clean_transformer.swapping.from_name import chosen_make
    from clean_transformer.swapping.swaps import HookPointsLost, swap

    require_folder(json, html)
    with chosen_make(with_) as make:
        chosen_device, chosen_dtype = resolve_device(device), choose_dtype(dtype)
        with progress() as on_step:
            on_step("reading the weights")
            chosen = choose_weights(weights)
            tokens, read = choose_tokens(text, weights, chosen.cfg)
            model = DemoTransformer.from_state_dict(chosen.state, chosen.cfg)
            model.to(chosen_device, chosen_dtype)
            on_step("running the original and the swapped model")
            with catch_warnings():
                simplefilter("ignore", HookPointsLost)  # the report lists the lost hook points
                swapped = swap(model, module, make)
            report = effect(model, swapped, tokens.to(chosen_device), f"{chosen.title}; on {read}")
        print_effect(report, Console())
        if json is not None:
            write_json(report, json)
        if html is not None:
            write_html(report, html)
