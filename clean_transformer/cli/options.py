"""Defines the options that several commands share, and turns dataclass fields into options."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from clean_transformer.support.dtypes import DTYPES

if TYPE_CHECKING:
    from clean_transformer.parity.modes import Compilation

WEIGHTS = (
    "Where to read the weights: a hub id (owner/name), an alias (gpt2, gpt2-medium, gpt2-large, "
    "gpt2-xl, distilgpt2), a folder, a file, or 'demo' for the small model of this package."
)

Text = Annotated[
    str | None,
    typer.Argument(help="The text. Without it, or with '-', standard input is read."),
]
TextFile = Annotated[Path | None, typer.Option("--file", help="Read the text from this file.")]
Weights = Annotated[
    str | None,
    typer.Option(help=f"{WEIGHTS} Default: gpt2, or demo if the hub cannot be reached."),
]
WeightsOrSynthetic = Annotated[
    str | None,
    typer.Option(
        help=f"{WEIGHTS} 'stress' and 'plain' are synthetic weights of GPT-2 small's shape; "
        "'stress:xl' has that of GPT-2 XL. Default: gpt2, or stress if the hub cannot be reached."
    ),
]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda, cuda:1, mps, …; auto chooses cuda, else mps, else cpu."),
]
Devices = Annotated[
    str,
    typer.Option(
        "--devices",
        "--device",
        help="One or more, with commas between: cpu,cuda,mps. all names these three; auto chooses "
        "cuda, else mps, else cpu.",
    ),
]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Also write the results to this file as JSON. With '-', standard output gets only the "
        "JSON.",
    ),
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        help="First import this package, which adds a device or a compile backend to PyTorch, such "
        "as torch_xla or openvino.torch. May be repeated.",
    ),
]
CompileBackend = Annotated[
    str | None,
    typer.Option(help="The backend of torch.compile: inductor, aot_eager, openvino, onnxrt, …"),
]
CompileDynamic = Annotated[
    bool, typer.Option("--compile-dynamic", help="Compile for several input shapes at once.")
]
CompileMode = Annotated[
    str | None, typer.Option(help="The mode of torch.compile, such as max-autotune.")
]
TOKENIZER = "Where to read the tokenizer: a hub id, an alias, a folder, or a .gguf file."
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help=f"{TOKENIZER} Default: that of the weights.")
]
HtmlFile = Annotated[
    Path | None, typer.Option("--html", help="Write the results as one HTML page here.")
]

Command = TypeVar("Command", bound=Callable[..., None])


def options_from(settings: type, panel: str) -> Callable[[Command], Command]:
    """Return a decorator that gives a command one option for each field of `settings`.

    `settings` is a dataclass whose fields are declared as
    `name: Annotated[type, "help text"] = default`. The command must have a `**` parameter, which
    receives the values of these options. `panel` is the heading above these options in the
    command's help.
    """

    def declare(command: Command) -> Command:
        signature = inspect.signature(command)
        parameters = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        hints = get_type_hints(settings, include_extras=True)
        for field in fields(settings):
            type_, help_text = get_args(hints[field.name])
            option = typer.Option(
                ... if field.default is MISSING else field.default,
                f"--{field.name.replace('_', '-')}",
                help=help_text,
                rich_help_panel=panel,
            )
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(field.name, kind, default=option, annotation=type_))
        declared: Any = command
        declared.__signature__ = signature.replace(parameters=parameters)
        declared.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return declare


def choose_compilation(backend: str | None, dynamic: bool, mode: str | None) -> "Compilation":
    """Return the `Compilation` that these options ask for; without a backend, that of inductor.

    Raises `ValueError` if no compile backend has this name, and for a mode with another backend
    than inductor, which would ignore it.
    """
    from clean_transformer.parity.graphs import require_backend
    from clean_transformer.parity.modes import Compilation

    chosen = Compilation(backend or "inductor", dynamic, mode)
    require_backend(chosen.backend)
    if mode and chosen.backend != "inductor":
        raise ValueError(f"only inductor has modes; leave out --compile-mode for {backend}")
    return chosen
