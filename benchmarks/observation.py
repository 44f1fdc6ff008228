"""Measures what observing costs: hook points without hooks, and a run that captures everything.

The capture is compared with a forward pass with explicit attention, which keeps no activations, and
with plain PyTorch hooks that keep the same activations in a list.

In every round, each kind of run does one forward pass, so that a slow minute of the machine slows
all kinds alike. The times are CPU seconds of one thread, because other programs on the machine
change them less than wall-clock time. "Program" is the time in the program and its libraries, and
"system" the time in the operating system, which clears new memory before a program gets it. The
script prints the median times of each kind, and the median over the rounds of the quotients of two
kinds, of all of the time and of the program's time alone.

    python -m benchmarks.observation --rounds 8
"""

import os
import random
import statistics
from collections.abc import Callable
from copy import deepcopy
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.hooks import HookPoint
from clean_transformer.model import DemoTransformer
from clean_transformer.weights.synthetic import stress

PLAIN = "forward"
WITHOUT = "forward of a model without hook points"
EXPLICIT = "forward with explicit attention"
CAPTURE = "capture of all activations"
LISTED = "plain PyTorch hooks that keep the same activations"
# Each quotient, and the bound that it has to keep. None: only to read.
QUOTIENTS = {
    (PLAIN, WITHOUT): 1.02,
    (CAPTURE, EXPLICIT): 1.08,
    (LISTED, EXPLICIT): None,
    (CAPTURE, LISTED): None,
    (CAPTURE, PLAIN): None,
}


class Seconds(NamedTuple):
    """The CPU seconds of one run."""

    program: float
    system: float


class NoHookPoint(nn.Module):
    """Stands in the place of a hook point, but a call does none of the work of `nn.Module`."""

    def __call__(self, activation: Tensor) -> Tensor:
        """Return `activation` itself."""
        return activation


def without_hook_points(model: DemoTransformer) -> DemoTransformer:
    """Return a copy of the model that shares its weights, and has a `NoHookPoint` in each place."""
    copy = sharing_weights(model)
    for module in [*copy.modules()]:
        for name, point in [*module.named_children()]:
            if isinstance(point, HookPoint):
                setattr(module, name, NoHookPoint())
    return copy


def sharing_weights(model: DemoTransformer) -> DemoTransformer:
    """Return a copy of the model with the same parameters."""
    return deepcopy(model, {id(weight): weight for weight in model.parameters()})


def runs(model: DemoTransformer, tokens: Tensor) -> dict[str, Callable[[], Any]]:
    """Return a function that does one forward pass, for each kind of run, by name."""
    bare = without_hook_points(model)
    watched = sharing_weights(model)
    for name, point in watched.hook_dict.items():
        if name.endswith("hook_pattern"):
            point.register_forward_hook(lambda *_: None)
    return {
        PLAIN: lambda: model(tokens),
        WITHOUT: lambda: bare(tokens),
        EXPLICIT: lambda: watched(tokens),
        CAPTURE: lambda: model.run_with_cache(tokens),
        LISTED: lambda: keeping_a_list(model, tokens),
    }


def keeping_a_list(model: DemoTransformer, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the logits and all activations, which plain forward hooks append to a list."""
    kept: list[Tensor] = []
    points = model.default_points().values()
    handles = [point.register_forward_hook(lambda *call: kept.append(call[-1])) for point in points]
    logits = model(tokens)
    for handle in handles:
        handle.remove()
    return logits, kept


@torch.no_grad()
def measure(model: DemoTransformer, tokens: Tensor, rounds: int) -> dict[str, list[Seconds]]:
    """Return the CPU seconds of each kind of run in each round. A first round is not counted.

    Each round has another order, because a run that frees much memory changes the time of the next
    one: the operating system must give this one new memory, or it finds the freed memory.
    """
    kinds = runs(model, tokens)
    taken: dict[str, list[Seconds]] = {name: [] for name in kinds}
    shuffle = random.Random(0).shuffle
    order = [*kinds]
    for _ in range(1 + rounds):
        for name in order:
            began = os.times()
            kinds[name]()
            ended = os.times()
            taken[name].append(Seconds(ended.user - began.user, ended.system - began.system))
        shuffle(order)
    return {name: times[1:] for name, times in taken.items()}


def main(
    rounds: Annotated[int, typer.Option(help="How often each kind of run is timed.")] = 8,
    batch: Annotated[int, typer.Option(help="Inputs in each forward pass.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens in each input.")] = 256,
) -> None:
    """Print what observing costs on GPT-2 small with `stress` weights in float32 on the CPU."""
    cfg = Config.gpt2()
    model = DemoTransformer.from_state_dict(stress(cfg), cfg)
    torch.set_num_threads(1)
    tokens = torch.randint(cfg.d_vocab, (batch, length))
    report(measure(model, tokens, rounds))
    print(f"the cache keeps {bytes_kept(model, tokens) / 1e9:.2f} GB of activations")


@torch.no_grad()
def bytes_kept(model: DemoTransformer, tokens: Tensor) -> int:
    """Return the bytes of all activations that `run_with_cache` keeps, without counting twice."""
    storages = [value.untyped_storage() for value in model.run_with_cache(tokens)[1].values()]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def report(taken: dict[str, list[Seconds]]) -> None:
    """Print the median times, and the median quotients with the largest values allowed."""
    table = Table("median CPU seconds", "program", "system", box=None)
    for name, times in taken.items():
        table.add_row(
            name, *(f"{statistics.median(each):.3f}" for each in zip(*times, strict=True))
        )
    quotients = Table("quotient", "median", "bound", "program", box=None)
    for (over, under), bound in QUOTIENTS.items():
        pairs = [*zip(taken[over], taken[under], strict=True)]
        median = statistics.median(sum(a) / sum(b) for a, b in pairs)
        of_program = statistics.median(a.program / b.program for a, b in pairs)
        allowed = "" if bound is None else f"≤ {bound:.2f}"
        quotients.add_row(f"{over} / {under}", f"{median:.3f}", allowed, f"{of_program:.3f}")
    console = Console(width=120)
    console.print(table)
    console.print(quotients)


if __name__ == "__main__":
    typer.run(main)
