"""The command `clean-transformer generate`."""

import sys
from time import perf_counter
from typing import Annotated, Any

import typer

from clean_transformer.cli import options
from clean_transformer.cli.terminal import print_text, progress, read_text, write_json
from clean_transformer.support.files import STANDARD_OUTPUT, require_folder
from clean_transformer.text.settings import Sampling


@options.options_from(Sampling, panel="How the next token is chosen")
def generate(
    text: options.Text = None,
    file: options.TextFile = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            "-n",
            help="Generate at most this many tokens. Default: 50; for the demo model, as many as "
            "it has positions.",
        ),
    ] = None,
    beams: Annotated[
        int, typer.Option(help="Number of continuations that beam search follows; 1 turns it off.")
    ] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this string. Repeat the option for several strings."),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the text while it is generated.")
    ] = False,
    weights: options.Weights = None,
    tokenizer: options.Tokenizer = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    json: options.JsonFile = None,
    **sampling: Any,
) -> None:
    """Continue a text.

    Ends at <|endoftext|>, before a stop string, or after --tokens tokens.

    Exit status: 0 = done, 2 = could not run, 130 = interrupted.
    """
    Sampling(**sampling)  # raises `ValueError` for a wrong setting before we read the weights
    if stream and (json is not None or beams != 1):
        raise ValueError("--stream cannot be combined with --beams or --json; leave one out")
    require_folder(json)
    prompt = read_text(text, file)

    from clean_transformer.cli.loading import read_model
    from clean_transformer.text.decoding import Stop

    with progress() as on_step:
        on_step("reading the weights")
        model = read_model(weights, device, dtype, tokenizer)
        stop_strings = stop or []
        if tokens is None:
            room = model.cfg.n_ctx - model.to_tokens(prompt).shape[1]
            tokens = max(1, room) if model.source == "demo" else 50
        began = perf_counter()
        if not stream:
            on_step(f"generating up to {tokens} tokens")
            end = model.tokenizer.stop_tokens
            prompts: list[list[int]] = model.to_tokens(prompt).tolist()
            [ids] = model.generate(
                prompts,
                tokens,
                beams=beams,
                stop_tokens=end,
                stop_strings=stop_strings,
                **sampling,
            )
            new = ids[len(prompts[0]) :]
            completion = Stop(end, stop_strings, model.tokenizer).text(new)
            seconds = perf_counter() - began
    if stream:
        print_text(prompt, end="")
        completion = ""
        for piece in model.stream(prompt, tokens, stop_strings=stop_strings, **sampling):
            print_text(piece, end="")
            completion += piece
        print()
        seconds = perf_counter() - began
        new = model.tokenizer.to_tokens(completion, False)[0].tolist()
    else:
        if json is not None:
            write_json(
                json, prompt=prompt, completion=completion, prompt_tokens=prompts[0], tokens=new
            )
        if json != STANDARD_OUTPUT:
            print_text(prompt + completion)
    about = "about " * stream  # the text of a stream may have been made of other tokens
    speed = f"{about}{len(new)} tokens in {seconds:.2g} s, {about}{len(new) / seconds:.3g} tokens/s"
    print(speed, file=sys.stderr)
