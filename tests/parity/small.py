"""Small models with the weights of the parity suite, and how to spoil what they compute."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.parity import invariants
from clean_transformer.parity.faults import DEVICE_FAULTS
from clean_transformer.parity.faults.corruptions import SINGLE, Corruption, DeviceFault
from clean_transformer.parity.faults.semantic.edits import edited, element, planted
from clean_transformer.parity.inputs import Weights
from clean_transformer.parity.operations import probes
from clean_transformer.parity.uses import every
from clean_transformer.weights.synthetic import plain, stress

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# The heads are as wide as GPT-2's, since some kernels and faults ask for that.
SMALL = {
    "n_layers": 2,
    "n_heads": 2,
    "d_model": 128,
    "d_head": 64,
    "d_mlp": 256,
    "d_vocab": 1500,
    "n_ctx": 64,
}

# No use of GPT-2 meets the conditions of these; only single operations find them.
PROBE_ONLY = {fault.name for fault in DEVICE_FAULTS if fault.use == SINGLE}
# A short text meets the conditions of these.
IN_A_SHORT_TEXT = [fault for fault in DEVICE_FAULTS if fault.use in ("forward", "hooks")]


def small_weights(kind: str = "stress", seed: int = 0, **changes) -> Weights:
    cfg = Config(**(SMALL | changes))
    return Weights(
        f"small {kind} weights", cfg, {"stress": stress, "plain": plain}[kind](cfg, seed)
    )


def small_model(weights: Weights, dtype: torch.dtype = F32) -> DemoTransformer:
    state = {name: value.to(dtype) for name, value in weights.state.items()}
    return DemoTransformer.from_state_dict(state, weights.cfg)


@contextmanager
def corrupted(model: torch.nn.Module, name: str, edit) -> Iterator[None]:
    """Within it, that submodule or hook point gives what `edit` makes of its output."""

    def change(module: object, args: object, output: Tensor) -> Tensor:
        return edit(output)

    handle = model.get_submodule(name).register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def broken(operation: str, corrupt: Corruption) -> AbstractContextManager[object]:
    """Within it, every call of that operation goes wrong like that, except in float64."""
    return DeviceFault("", "", frozenset({operation}), lambda call: True, corrupt).plant()


@contextmanager
def everywhere(operation: str, kernel: Callable[..., Any]) -> Iterator[None]:
    """Within it, PyTorch's CPU runs that kernel for the operation, in every dtype."""
    with warnings.catch_warnings(), torch.library._scoped_library("aten", "IMPL") as library:
        warnings.simplefilter("ignore")
        library.impl(operation, kernel, "CPU")
        yield


@contextmanager
def model_only() -> Iterator[None]:
    """Within it, `check_device` skips what has its own tests.

    That is the fresh process, single operations, and all uses but the first.
    """
    first = every.uses
    here = [check for check in invariants.INVARIANTS if check.__name__ != "fresh_process"]
    with pytest.MonkeyPatch.context() as few:
        few.setattr(every, "uses", lambda cfg: first(cfg)[:1])
        few.setattr(invariants, "INVARIANTS", here)
        few.setattr(probes, "PROBES", ())
        yield


class _NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        _refuse_float64(func, (args, options))
        result = func(*args, **options)
        _refuse_float64(func, result)
        return result


def _refuse_float64(func: Any, values: Any) -> None:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.dtype == torch.float64:
            raise TypeError(f"{func} with a float64 tensor: this device has no float64")


def no_float64() -> AbstractContextManager[Any]:
    """Within it, the CPU behaves like a device without float64, such as MPS.

    An operation that takes or returns a float64 tensor raises `TypeError`. For an operator, such as
    `+`, Python replaces our message by its own.
    """
    return _NoFloat64()


def weight_changed(
    relative: float, parameter: str = "blocks.0.mlp.W_in", index: tuple[int, ...] = (0, 0)
) -> AbstractContextManager[Any]:
    """Within it, all models multiply one element of a parameter by 1 + `relative`."""
    return planted(
        edited(DemoTransformer, {parameter: element(lambda w: w * (1 + relative), *index)})
    )
