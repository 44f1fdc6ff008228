"""Black boxes: modules whose inner steps cannot be watched, judged by their output.

These are compiled modules, optimized modules, and modules without our hook points.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.hooks import HookedModule
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.limits import HEALTHY_RHO, WRONG_FACTOR, index_of_largest, rounding
from clean_transformer.parity.oracle import M, trusted
from clean_transformer.support.numerics import upcast
from clean_transformer.support.stand_in import Method, StandIn


def is_black_box(part: nn.Module) -> bool:
    """Whether another `forward` was put on the module, whose inner steps cannot be watched."""
    return "forward" in vars(part)


def has_black_boxes(module: nn.Module) -> bool:
    """Whether the module or a submodule is a black box, whose hook points are not called."""
    return any(is_black_box(part) for part in module.modules())


def as_written(module: M) -> M:
    """A copy of the module in which every black box runs the `forward` of its class."""
    copied = deepcopy(module)
    for part in copied.modules():
        vars(part).pop("forward", None)
    return copied


def leaves(model: nn.Module) -> dict[str, HookedModule]:
    """The modules that do the arithmetic, by path: black boxes, and modules without submodules."""
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
    """Run each of the model's leaves with `torch.compile`; hooks on their outputs keep working.

    Raises Dynamo's recompile limit (8), so that every input shape is really compiled.
    """
    limits = {"cache_size_limit": sys.maxsize, "accumulated_cache_size_limit": sys.maxsize}
    with ExitStack() as put, torch._dynamo.config.patch(limits):
        for part in leaves(model).values():
            put.enter_context(StandIn(part, "forward", compiled))
        yield


def compiled(below: Method) -> Method:
    """Compile the method. Modules of one class share the graphs of a method."""
    if not isinstance(below, MethodType):  # a callable object, such as `optimize` puts there
        below = MethodType(type(below).__call__, below)
    return torch.compile(below, dynamic=False)


@torch.no_grad()
def isolate_black_boxes(
    model: HookedModule, on_cpu: HookedModule, oracle: HookedModule, *inputs: Tensor, case: str
) -> list[Isolated]:
    """The error of every leaf, given the device's own input; see `judge_black_box`."""
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
                on_cpu.get_submodule(name),
                oracle.get_submodule(name),
                *(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args),
            )
            for name, (args, output) in calls.items()
        ]


def judge_black_box(
    name: str,
    case: str,
    output: Tensor,
    on_cpu: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    *inputs: Any,
) -> Isolated:
    """A module's output beside that of the same module on the CPU and in float64.

    The error of a row is its root mean square over the last axis. `ratio` is the largest error of a
    row, divided by the largest error of the CPU in the same dtype. `inputs` are on the CPU.
    """
    exact = oracle(*(upcast(x) if isinstance(x, Tensor) else x for x in inputs))
    error, healthy_error = (upcast(x) - exact for x in (output, on_cpu(*inputs)))
    # The CPU may happen to be exact. The error of rounding the output is always healthy.
    healthy_error = healthy_error.abs().maximum(rounding(output.dtype) * exact.abs())
    by_row = error.square().mean(dim=-1).sqrt()
    envelope = float(healthy_error.square().mean(dim=-1).sqrt().max())
    largest = float(by_row.nan_to_num(torch.inf, torch.inf).max())
    healthy = HEALTHY_RHO[output.dtype]
    relative = float(error.square().mean().sqrt() / exact.square().mean().sqrt())
    return Isolated(
        name=name,
        case=case,
        path="black box",
        operation="black box",
        ratio=largest / envelope if envelope else (torch.inf if largest else 0.0),
        healthy=healthy,
        wrong=WRONG_FACTOR * healthy,
        rms_ratio=float(by_row.square().mean().sqrt()) / envelope if envelope else 0.0,
        bits=-float(torch.tensor(relative).log2()),
        worst_index=index_of_largest(by_row),
    )
