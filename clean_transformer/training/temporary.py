"""Context managers for what training changes. At its end, each one restores the old state."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from clean_transformer.model import DemoTransformer
from clean_transformer.support.stand_in import Method, StandIn

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def training_state(model: nn.Module) -> Iterator[None]:
    """Let training change modules' modes and parameters' gradients, and restore them at the end.

    This restores each module's train or eval mode, and each parameter's `grad` and `requires_grad`.
    Gradients start as None. `unembed.b_U` gets no gradient: GPT-2 has no such bias, and Hugging
    Face's format has no place for it. Sharding the model replaces its parameters. The new
    parameters have no gradients at the end.
    """
    modes = {module: module.training for module in model.modules()}
    required = {name: each.requires_grad for name, each in model.named_parameters()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required[name] and name != "unembed.b_U")
        parameter.grad = None
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
            gradient = gradients.get(parameter)
            parameter.grad = None if gradient is None else gradient.to(parameter.device)


@contextmanager
def random_generators(device: torch.device) -> Iterator[list[torch.Generator]]:
    """Yield PyTorch's global random generators, and restore their states at the end.

    They are the generators of the CPU and of the device; the caller may seed them.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    if device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    states = [generator.get_state() for generator in generators]
    try:
        yield generators
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Let PyTorch use only kernels that give the same bits each time."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    config = os.environ.get(CUBLAS)
    os.environ.setdefault(CUBLAS, ":4096:8")  # deterministic cuBLAS needs such a setting
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        if config is None:
            os.environ.pop(CUBLAS, None)


@contextmanager
def recomputed_blocks(model: DemoTransformer) -> Iterator[None]:
    """Use gradient checkpointing: keep only each block's input for the backward pass.

    The backward pass then recomputes the activations of one block at a time. A step takes a third
    more time (Chen et al. 2016).
    """
    with ExitStack() as put:
        for block in model.blocks:
            put.enter_context(StandIn(block, "forward", recomputed))
        yield


def recomputed(below: Method) -> Method:
    """Return the method `below`, wrapped in gradient checkpointing."""
    return partial(checkpoint, below, use_reentrant=False)
