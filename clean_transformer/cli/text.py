"""The commands for text and for what reads it: generate, predict, tokens, info."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from clean_transformer.analysis.prediction import TokenScore
from clean_transformer.analysis.prediction import predict as predict_text
from clean_transformer.cli.terminal import one_line_errors, progress, read_text
from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.support.dtypes import choose_dtype
from clean_transformer.text.decoding import Stop
from clean_transformer.text.sampling import Sampling
from clean_transformer.text.tokenizer import Tokenizer, visible
from clean_transformer.weights.hub import HubError
from clean_transformer.weights.load import read_pretrained
from clean_transformer.weights.shapes import parameter_axes, parameter_shapes

TextArgument = Annotated[
    str | None, typer.Argument(help="The text; standard input for '-' or when it is piped in.")
]


FileOption = Annotated[Path | None, typer.Option("--file", help="Read the text from a file.")]


WeightsOption = Annotated[
    str | None,
    typer.Option(help="Hub id, alias or folder. Default: gpt2, or demo where the hub is away."),
]


DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, …")]


DtypeOption = Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16")]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for a program.")]


Read = TypeVar("Read")


def generate(
    text: TextArgument = None,
    file: FileOption = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", "-n", help="At most; by default 50, or demo's story.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; above, one is drawn.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest with this probability together.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from those this likely, relative to the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that occurred are less likely.")
    ] = 1.0,
    frequency_penalty: Annotated[
        float, typer.Option(help="Above 0, the more so the more often they were generated.")
    ] = 0.0,
    beams: Annotated[int, typer.Option(help="Follow this many continuations at once.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same draws each time.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string; may be given repeatedly.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is made.")] = False,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Continue a text."""
    stop_strings = stop or []
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
    }
    with one_line_errors():
        Sampling(**settings)  # to refuse what makes no sense before the weights are read
        if stream and (as_json or beams != 1):
            raise ValueError("--stream goes with neither --beams nor --json; leave one out")
        prompt = read_text(text, file)
        with progress() as on_step:
            on_step("reading the weights")
            model = load(weights, device, dtype)
            if tokens is None:
                room = model.cfg.n_ctx - model.to_tokens(prompt).shape[1]
                tokens = max(1, room) if model.source == "demo" else 50
            if not stream:
                on_step(f"generating up to {tokens} tokens")
                end = [model.tokenizer.eos_token_id]
                prompts: list[list[int]] = model.to_tokens(prompt).tolist()
                [ids] = model.generate(
                    prompts,
                    tokens,
                    beams=beams,
                    stop_tokens=end,
                    stop_strings=stop_strings,
                    **settings,
                )
                new = ids[len(prompts[0]) :]
                completion = Stop(end, stop_strings, model.tokenizer).text(new)
        if stream:
            print(prompt, end="", flush=True)
            for piece in model.stream(prompt, tokens, stop_strings=stop_strings, **settings):
                print(piece, end="", flush=True)
            print()
        elif as_json:
            print_json(prompt=prompt, completion=completion, prompt_tokens=prompts[0], tokens=new)
        else:
            print(prompt + completion)


def predict(
    text: TextArgument = None,
    file: FileOption = None,
    top: Annotated[int, typer.Option(help="How many of the likeliest and least likely.")] = 5,
    weights: WeightsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Show what a model expects after a text, and how well it expected each of its tokens."""
    with one_line_errors():
        read = read_text(text, file)
        with progress() as on_step:
            on_step("reading the weights")
            model = load(weights, device, dtype)
            on_step("reading the text")
            prediction = predict_text(model, read, top)
        ids = model.to_tokens(read)[0].tolist()
        words = model.to_str_tokens(ids)
        chances = [None, *prediction.token_probabilities.tolist()]
        losses = [None, *prediction.losses.tolist()]

        def named(scores: list[TokenScore]) -> list[dict[str, Any]]:
            return [vars(score) | {"token": model.to_string([score.id])} for score in scores]

        if as_json:
            print_json(
                top=named(prediction.top),
                bottom=named(prediction.bottom),
                tokens=[
                    {"id": id_, "token": word, "probability": chance, "loss": loss}
                    for id_, word, chance, loss in zip(ids, words, chances, losses, strict=True)
                ],
            )
            return
        for title, scores in (("likeliest", prediction.top), ("least likely", prediction.bottom)):
            rows = [
                (visible(score["token"]), score["id"], score["logit"], score["probability"])
                for score in named(scores)
            ]
            print_table(f"the {title} next tokens", ["token", "id", "logit", "probability"], rows)
        rows = [*zip(map(visible, words), ids, chances, losses, strict=True)]
        print_table("the text", ["token", "id", "probability", "loss"], rows)
        if len(prediction.losses):
            mean = prediction.losses.mean()
            print(f"mean loss {mean:.4g} nats per token, perplexity {mean.exp():.4g}")


def tokens(
    text: TextArgument = None,
    file: FileOption = None,
    weights: WeightsOption = None,
    bos: Annotated[
        bool, typer.Option(help="Begin with <|endoftext|>, as models are given.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Show how a text splits into tokens."""
    with one_line_errors():
        read = read_text(text, file)
        tokenizer = read_or_demo(Tokenizer.from_pretrained, weights)
        ids = tokenizer.to_tokens(read, bos)[0].tolist()
        words = tokenizer.to_str_tokens(ids)
        if as_json:
            print_json(ids=ids, tokens=words)
        else:
            places = range(len(ids))
            rows = [*zip(places, map(visible, words), ids, strict=True)]
            print_table(f"{len(ids)} tokens", ["position", "token", "id"], rows)


def info(
    weights: Annotated[
        str | None, typer.Option(help="Hub id, alias or folder. Default: GPT-2 small's shape.")
    ] = None,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
) -> None:
    """Show a model's hyper-parameters, its parameters, and the memory that they take."""
    with one_line_errors():
        exact = choose_dtype(dtype)
        if weights is None:
            cfg = Config.gpt2()
        else:
            cfg, _ = read_pretrained(weights, torch.device("meta"), exact)
        shapes = parameter_shapes(cfg)
        count = sum(torch.Size(shape).numel() for shape in shapes.values())
        per_position = 2 * cfg.n_layers * cfg.n_heads * cfg.d_head * exact.itemsize
        memory = {"parameters": count * exact.itemsize, "kv_cache": per_position * cfg.n_ctx}
        if as_json:
            print_json(cfg=cfg.to_dict(), parameters=shapes, count=count, bytes=memory)
            return
        for field, value in cfg.to_dict().items():
            print(f"{field:20}{value}")
        Console().print(parameter_tree(cfg, f"{count:,} parameters"))
        print(f"{memory['parameters'] / 2**20:,.1f} MiB of parameters in {dtype}")
        print(f"{memory['kv_cache'] / 2**20:,.1f} MiB of keys and values for {cfg.n_ctx} positions")


def load(weights: str | None, device: str, dtype: str) -> DemoTransformer:
    """The model and its tokenizer, which is read first: where it is missing, that shows at once."""
    exact = choose_dtype(dtype)

    def read(source: str) -> DemoTransformer:
        tokenizer = Tokenizer.from_pretrained(source)
        model = DemoTransformer.from_pretrained(source, device=device, dtype=exact)
        model.tokenizer = tokenizer
        return model

    return read_or_demo(read, weights)


def read_or_demo(read: Callable[[str], Read], weights: str | None) -> Read:
    """What is read from that source; from GPT-2 if none was named, or else from the demo, loudly.

    A command works without a network too, and never in secret with another model.
    """
    if weights is not None:
        return read(weights)
    try:
        return read("gpt2")
    except HubError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"note: {error}. This is 'demo', the small model that comes with clean-transformer and "
            "knows little stories only; --weights chooses another",
            style="yellow",
            markup=False,
        )
        return read("demo")


def print_json(**values: Any) -> None:
    """One object on standard output. Raises `ValueError` for a number that JSON has not."""
    print(json.dumps(values, allow_nan=False))


def print_table(title: str, columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    """Numbers to four digits; what is missing is blank."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "token" else "right")
    for row in rows:
        table.add_row(*(Text(format_cell(cell)) for cell in row))
    Console().print(table)


def format_cell(value: str | int | float | None) -> str:
    """As a person reads it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parameter_tree(cfg: Config, title: str) -> Tree:
    """The parameters by module, with axes, lengths and counts; the first block stands for all."""
    tree, shapes = Tree(title), parameter_shapes(cfg)
    branches: dict[tuple[str, ...], Tree] = {(): tree}
    for name, axes in parameter_axes(cfg).items():
        *modules, parameter = name.replace("blocks.0", f"{cfg.n_layers} blocks, each").split(".")
        if modules[0] == "blocks":
            continue
        for depth in range(len(modules)):
            path = tuple(modules[: depth + 1])
            if path not in branches:
                branches[path] = branches[path[:-1]].add(modules[depth])
        lengths = " × ".join(map(str, shapes[name]))
        count = torch.Size(shapes[name]).numel()
        branches[tuple(modules)].add(Text(f"{parameter:6}[{axes}]  {lengths}  = {count:,}"))
    return tree
