"""TODO cli/swap."""

from pathlib import Path
from typing import Annotated
from warnings import catch_warnings, simplefilter

import typer
from rich.console import Console

from clean_transformer.cli.terminal import one_line_errors, progress


def swap_modules(
    text: Annotated[
        str | None, typer.Argument(help="What to read. Default: ids spread over the vocabulary.")
    ] = None,
    *,
    module: Annotated[
        str, typer.Option(help="Where: embed, blocks.3.attn, 'blocks.[3-7].mlp', 'blocks.*', …")
    ],
    with_: Annotated[
        str,
        typer.Option(
            "--with",
            help="variants.NAME, or FILE.py:NAME for a class of your own, made with the Config, "
            "or a function of the old module and its path.",
        ),
    ],
    weights: Annotated[str | None, typer.Option(help="As for parity.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16")] = "float32",
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML page.")] = None,
) -> None:
    """Put other modules in the place of some, and show what that changes.

    Exit status: 0, or 2 where it could not be done.
    """
    from clean_transformer.model import DemoTransformer
    from clean_transformer.parity.inputs import choose_tokens, choose_weights
    from clean_transformer.support.devices import resolve_device
    from clean_transformer.support.dtypes import DTYPES, choose_dtypes
    from clean_transformer.swapping.effect_report import print_effect, write_html, write_json
    from clean_transformer.swapping.effects import effect
    from clean_transformer.swapping.from_name import chosen_make
    from clean_transformer.swapping.swaps import HookPointsLost, swap

    with one_line_errors(), chosen_make(with_) as make:
        chosen_device, [chosen_dtype] = resolve_device(device), choose_dtypes(dtype)
        with progress() as on_step:
            on_step("reading the weights")
            chosen = choose_weights(weights)
            tokens, read = choose_tokens(text, weights, chosen.cfg)
            model = DemoTransformer.from_state_dict(chosen.state, chosen.cfg)
            model.to(chosen_device, DTYPES[chosen_dtype])
            on_step("running the model as it was, and swapped")
            with catch_warnings():
                simplefilter("ignore", HookPointsLost)  # the report has them
                swapped = swap(model, module, make)
            report = effect(model, swapped, tokens.to(chosen_device), f"{chosen.title}; on {read}")
        print_effect(report, Console())
        if json is not None:
            write_json(report, json)
        if html is not None:
            write_html(report, html)
