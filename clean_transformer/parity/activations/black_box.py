"""Black boxes: modules whose inner activations cannot be watched. Only their output is judged.

Compiled modules, optimized modules, and modules without our hook points are black boxes.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from clean_transformer.hooks import HookedModule
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.limits import PART, index_of_largest
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, M, trusted
from clean_transformer.parity.rounding import RandomRounding
from clean_transformer.support.numerics import upcast
from clean_transformer.support.stand_in import Method, StandIn

# Draws of random rounding for one output.
DRAWS = 6


def is_black_box(part: nn.Module) -> bool:
    """Whether the module instance has another `forward` than its class, so it calls no hooks."""
    return "forward" in vars(part)


def has_black_boxes(module: nn.Module) -> bool:
    """Whether the module or one of its submodules is a black box."""
    return any(is_black_box(part) for part in module.modules())


def as_written(module: M) -> M:
    """A copy of the module in which every black box runs the `forward` of its class."""
    copied = deepcopy(module)
    for part in copied.modules():
        vars(part).pop("forward", None)
    return copied


def leaves(model: nn.Module) -> dict[str, HookedModule]:
    """The modules that do the arithmetic, by path: black boxes, and modules without submodules.

    Only modules with our hook points are included.
    """
    found: dict[str, HookedModule] = {}
    for name, part in model.named_children():
        within = {} if is_black_box(part) else leaves(part)
        if within:
            found |= {f"{name}.{below}": leaf for below, leaf in within.items()}
        elif isinstance(part, HookedModule):
            found[name] = part
    return found


@contextmanager
def compiled_leaves(model: nn.Module) -> Iterator[None]:
    """Compile each of the model's `leaves` with `torch.compile` inside a `with` block.

    Hooks on the leaves' outputs still work. Dynamo's recompile limit (8) is raised, so that every
    input shape is really compiled.
    """
    limits = {"cache_size_limit": sys.maxsize, "accumulated_cache_size_limit": sys.maxsize}
    with ExitStack() as put, torch._dynamo.config.patch(limits):
        for part in leaves(model).values():
            put.enter_context(StandIn(part, "forward", compiled))
        yield


def compiled(below: Method) -> Method:
    """Compile a module's method. Modules of the same class share the compiled graphs."""
    if not isinstance(below, MethodType):  # `optimize` replaces methods by callable objects
        below = MethodType(type(below).__call__, below)
    return torch.compile(below, dynamic=False)


@torch.no_grad()
def isolate_black_boxes(
    model: HookedModule, oracle: HookedModule, *inputs: Tensor, case: str
) -> list[Isolated]:
    """Run the model and judge the output of each of its `leaves` with `judge_black_box`.

    `oracle` computes each leaf from the input that it had on the device.
    """
    calls: dict[str, tuple[tuple[Any, ...], Tensor]] = {}

    def keep(name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        calls[name] = (args, output)

    with ExitStack() as placed:
        for name, part in leaves(model).items():
            placed.callback(part.register_forward_hook(partial(keep, name)).remove)
        model(*inputs)
    with trusted():
        return [
            judge_black_box(
                name,
                case,
                output.cpu(),
                oracle.get_submodule(name),
                *(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args),
            )
            for name, (args, output) in calls.items()
        ]


def judge_black_box(
    name: str,
    case: str,
    output: Tensor,
    oracle: Callable[..., Any],
    *inputs: Any,
) -> Isolated:
    """Judge a module's output, row by row, by what rounding alone may do to it.

    `oracle` is the same module in float64 on the CPU. `output` and `inputs` are on the CPU. The
    error of a row is the root mean square of output − exact over the last axis. `ratio` is the
    largest error of a row in units of what `RandomRounding` makes of that row in the oracle. So no
    module in the device's dtype takes part.
    """
    given = [upcast(x) if isinstance(x, Tensor) else x for x in inputs]
    exact = first_tensor(oracle(*given))
    total = torch.zeros_like(exact)
    for seed in range(DRAWS):
        with RandomRounding(output.dtype, seed=seed):
            moved = first_tensor(oracle(*given))
        total += (moved - exact).square()
    error = (upcast(output) - exact).square().mean(dim=-1).sqrt()
    envelope = (total.mean(dim=-1) / DRAWS).sqrt()
    ratios = torch.where(error == 0, 0.0, error / envelope).nan_to_num(math.inf, math.inf)
    healthy, wrong = PART.limits(1, UNIT_ROUNDOFF[output.dtype])
    relative = float(error.square().mean().sqrt() / exact.square().mean().sqrt())
    return Isolated(
        name=name,
        case=case,
        path="black box",
        operation="black box",
        ratio=float(ratios.max()) if ratios.numel() else 0.0,
        healthy=healthy,
        wrong=wrong,
        rms_ratio=float(ratios.square().mean().sqrt()) if ratios.numel() else 0.0,
        bits=-math.log2(relative) if relative > 0 else math.inf,
        worst_index=index_of_largest(ratios) if ratios.numel() else (),
    )


def first_tensor(output: Any) -> Tensor:
    """The module's output, or the first tensor of a module that returns several things."""
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
