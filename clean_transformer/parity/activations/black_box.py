"""Checks black boxes: modules whose inner activations cannot be watched.

Compiled modules, modules that `optimize()` has changed, and modules without our hook points are
black boxes. Only the output of a black box is checked.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from clean_transformer.hooks import HookedModule
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.limits import ALONE, index_of_largest
from clean_transformer.parity.modes import INDUCTOR, Compilation
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, M, trusted
from clean_transformer.parity.rounding import RandomRounding
from clean_transformer.support.numerics import upcast
from clean_transformer.support.stand_in import Method, StandIn

# How many times the oracle runs under `RandomRounding` to judge one output.
DRAWS = 6
# The value of `Isolated.path` in the results for black boxes.
BLACK_BOX = "black box"


def is_black_box(part: nn.Module) -> bool:
    """Whether the module is compiled, or has an attribute that replaces its method `forward`.

    `optimize()`, for example, sets such an attribute.
    """
    return "forward" in vars(part) or is_compiled(part)


def is_compiled(part: nn.Module) -> bool:
    """Whether `part.compile()` has compiled the module, or `torch.compile` has wrapped it."""
    return getattr(part, "_compiled_call_impl", None) is not None or "_orig_mod" in part._modules


def has_black_boxes(module: nn.Module) -> bool:
    """Whether this module or a submodule is compiled or optimized (see `is_black_box`)."""
    return any(is_black_box(part) for part in module.modules())


def as_written(module: M) -> M:
    """Return a copy of the module that is neither compiled nor optimized.

    Every module in the copy runs the `forward` of its class.
    """
    # A deep copy of a module that was compiled with `module.compile()` is not compiled.
    copied = deepcopy(cast(M, module._modules.get("_orig_mod", module)))
    for part in [*copied.modules()]:
        vars(part).pop("forward", None)
        for name, child in part._modules.items():
            # A compiled module has no truth value.
            if child is not None:
                part._modules[name] = child._modules.get("_orig_mod", child)
    return copied


def leaves(model: nn.Module) -> dict[str, HookedModule]:
    """Return the smallest submodules whose output can be watched, with their paths as keys.

    These submodules are the `HookedModule`s that have no `HookedModule` inside, or that are
    compiled or optimized as a whole.
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
def compiled_leaves(model: nn.Module, compilation: Compilation = INDUCTOR) -> Iterator[None]:
    """Compile each submodule in `leaves(model)` with `torch.compile` inside a `with` block.

    Hooks on the outputs of these submodules still work. Dynamo's recompile limit (8) is raised, so
    that every input shape is really compiled.
    """
    limits = {"cache_size_limit": sys.maxsize, "accumulated_cache_size_limit": sys.maxsize}
    with ExitStack() as put, torch._dynamo.config.patch(limits):
        for part in leaves(model).values():
            put.enter_context(StandIn(part, "forward", partial(compiled, compilation)))
        yield


def compiled(compilation: Compilation, below: Method) -> Method:
    """Return the method `below` of a module, compiled with `torch.compile`."""
    if not isinstance(below, MethodType):  # `optimize` replaces methods by callable objects
        below = MethodType(type(below).__call__, below)
    # Modules of the same class share the compiled graphs.
    return torch.compile(below, **asdict(compilation))


@torch.no_grad()
def isolate_black_boxes(
    model: HookedModule, oracle: HookedModule, *inputs: Tensor, case: str
) -> list[Isolated]:
    """Run the model, and check the output of each submodule in `leaves(model)`.

    `oracle` is the same model in float64 on the CPU. It computes the exact output of each submodule
    from the input that the submodule had on the device. If the model itself is compiled or
    optimized, or if `leaves(model)` is empty, only the model's own output is checked. `case`
    describes the inputs in the results.
    """
    parts = {} if is_black_box(model) else leaves(model)
    calls: dict[str, tuple[tuple[Any, ...], Tensor]] = {}

    def keep(name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        calls[name] = (args, output)

    with ExitStack() as placed:
        for name, part in (parts or {"": model}).items():
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
    """Compare the error of each row of a module's output with the change that rounding causes.

    `output` and `inputs` are the module's output and inputs on the device, copied to the CPU.
    `oracle` is the same module in float64 on the CPU.

    A row is a slice along the last axis. Its error is the root mean square of output − exact. The
    oracle also runs DRAWS times under `RandomRounding`, which changes each row. The error ratio of
    a row is its error, divided by the root mean square of these changes.
    """
    given = [upcast(x) if isinstance(x, Tensor) else x for x in inputs]
    exact = first_tensor(oracle(*given))
    moved = []
    for seed in range(DRAWS):
        with RandomRounding(output.dtype, seed=seed):
            moved.append(first_tensor(oracle(*given)))
    return judge_output(name, case, output, exact, moved)


def judge_output(
    name: str, case: str, output: Tensor, exact: Tensor, moved: Sequence[Tensor]
) -> Isolated:
    """Compare the error of each row of `output` with the change that rounding causes.

    `exact` is the exact output, and `moved` has the outputs of runs under `RandomRounding`. All
    tensors are on the CPU. See `judge_black_box` for the error ratio of a row.
    """
    total = torch.zeros_like(exact)
    for each in moved:
        total += _difference(each, exact).square()
    error = _difference(upcast(output), exact).square().mean(dim=-1).sqrt()
    envelope = (total.mean(dim=-1) / len(moved)).sqrt()
    ratios = torch.where(error == 0, 0.0, error / envelope).nan_to_num(math.inf, math.inf)
    healthy, wrong = ALONE.limits(1, UNIT_ROUNDOFF[output.dtype])
    scale = exact[exact.isfinite()].square().mean()
    relative = float((error.square().mean() / scale).sqrt().nan_to_num(math.inf, math.inf))
    return Isolated(
        name=name,
        case=case,
        path=BLACK_BOX,
        operation=ALONE.name,
        ratio=float(ratios.max()) if ratios.numel() else 0.0,
        healthy=healthy,
        wrong=wrong,
        rms_ratio=float(ratios.square().mean().sqrt()) if ratios.numel() else 0.0,
        bits=-math.log2(relative) if error.any() else math.inf,
        worst_index=index_of_largest(ratios) if ratios.numel() else (),
    )


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Return a − b, and 0 where both are the same infinity, such as masked scores of −inf."""
    return torch.where(a == b, 0.0, a - b)


def first_tensor(output: Any) -> Tensor:
    """Return the first floating-point tensor in a module's output (see `tensors`)."""
    return tensors(output)[0]


def tensors(output: Any) -> list[Tensor]:
    """Return all floating-point tensors in a module's output (see `all_tensors`)."""
    return [leaf for leaf in all_tensors(output) if leaf.is_floating_point()]


def all_tensors(output: Any) -> list[Tensor]:
    """Return all tensors in a module's output, which is a tensor, a tuple or a dict.

    Raises `ValueError` for complex tensors.
    """
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if any(leaf.is_complex() for leaf in leaves):
        raise ValueError("an output is complex; only real outputs can be checked")
    return leaves
