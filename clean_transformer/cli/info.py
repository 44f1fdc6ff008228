"""The command `clean-transformer info`."""

from math import prod
from typing import Annotated

import typer
from rich.text import Text
from rich.tree import Tree

from clean_transformer.cli import options
from clean_transformer.cli.terminal import open_console, write_json
from clean_transformer.support.files import STANDARD_OUTPUT, require_folder


def info(
    weights: Annotated[
        str | None,
        typer.Option(help=f"{options.WEIGHTS} Default: GPT-2 small, without reading a file."),
    ] = None,
    dtype: options.Dtype = "float32",
    json: options.JsonFile = None,
) -> None:
    """Show a model's hyperparameters, its parameters, and the memory that they need.

    Exit status: 0 = done, 2 = could not run, 130 = interrupted.
    """
    import torch

    from clean_transformer.config import Config
    from clean_transformer.support.dtypes import choose_dtype
    from clean_transformer.weights.load import read_pretrained
    from clean_transformer.weights.shapes import parameter_axes, parameter_shapes

    require_folder(json)
    exact = choose_dtype(dtype)
    if weights is None:
        cfg = Config.gpt2()
    else:
        cfg, _ = read_pretrained(weights, torch.device("meta"), exact)
    shapes = parameter_shapes(cfg)
    count = sum(map(prod, shapes.values()))
    per_position = 2 * cfg.n_layers * cfg.n_heads * cfg.d_head * exact.itemsize
    memory = {"parameters": count * exact.itemsize, "kv_cache": per_position * cfg.n_ctx}
    if json is not None:
        write_json(json, cfg=cfg.to_dict(), parameters=shapes, count=count, bytes=memory)
    if json == STANDARD_OUTPUT:
        return
    for field, value in cfg.to_dict().items():
        print(f"{field:20}{value}")
    tree = parameter_tree(f"{count:,} parameters", cfg.n_layers, parameter_axes(cfg), shapes)
    open_console().print(tree)
    print(f"{memory['parameters'] / 2**20:,.1f} MiB of parameters in {dtype}")
    print(f"{memory['kv_cache'] / 2**20:,.1f} MiB of keys and values for {cfg.n_ctx} positions")


def parameter_tree(
    title: str, n_layers: int, axes: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> Tree:
    """Return a tree of modules and parameters, with the axes and the shape of each parameter.

    The keys of `axes` and `shapes` are the names of the parameters. The tree also shows how many
    numbers each parameter has. It has one branch for all `n_layers` blocks, because all blocks have
    the same parameters.
    """
    tree = Tree(title)
    branches: dict[tuple[str, ...], Tree] = {(): tree}
    for name, shape in shapes.items():
        *modules, parameter = name.replace("blocks.0", f"{n_layers} blocks, each").split(".")
        if modules[0] == "blocks":
            continue
        for depth, module in enumerate(modules):
            path = tuple(modules[: depth + 1])
            if path not in branches:
                branches[path] = branches[path[:-1]].add(module)
        lengths = " × ".join(map(str, shape))
        line = f"{parameter:6}[{axes[name]}]  {lengths}  = {prod(shape):,}"
        branches[tuple(modules)].add(Text(line))
    return tree
