"""Black boxes: modules whose inner activations cannot be watched. Only their output is judged.

Compiled modules, optimized modules, and modules without our hook points are black boxes.
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
    model: HookedModule, on_cpu: HookedModule, oracle: HookedModule, *inputs: Tensor, case: str
) -> list[Isolated]:
    """Run the model and judge the output of each of its `leaves` with `judge_black_box`.

    `on_cpu` and `oracle` compute each leaf from the input that it had on the device.
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
    """Judge a module's output by how much less accurate it is than the CPU's output.

    `on_cpu` is the same module on the CPU in the same dtype, `oracle` the same module in float64.
    `output` and `inputs` are on the CPU. The error of a row is the root mean square of
    output − exact over the last axis. In the result, `ratio` is the largest error of a row of
    `output`, divided by the largest error of a row of the CPU's output.
    """
    exact = oracle(*(upcast(x) if isinstance(x, Tensor) else x for x in inputs))
    error, healthy_error = (upcast(x) - exact for x in (output, on_cpu(*inputs)))
    # The CPU's output may happen to be exact. An error as small as one rounding is always healthy.
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
