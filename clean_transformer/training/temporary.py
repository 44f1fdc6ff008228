"""What training changes for a while. Each of these puts everything back at its end."""

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
    """Let training set each module's mode, and each parameter's `grad` and `requires_grad`.

    Gradients start as None. `b_U` gets no gradient: GPT-2 has no such bias, and Hugging Face's
    format has no place for it. If the model was sharded meanwhile, its parameters are new ones, and
    have no gradients in the end.
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
    """Lend PyTorch's global random generators, of the CPU and of the device, to be seeded."""
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
    """Use only kernels that give the same bits each time."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    config = os.environ.get(CUBLAS)
    os.environ.setdefault(CUBLAS, ":4096:8")  # PyTorch refuses cuBLAS without such a setting
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

    The backward pass computes the activations of one block at a time again, which takes a third
    more time (Chen et al. 2016).
    """
    with ExitStack() as put:
        for block in model.blocks:
            put.enter_context(StandIn(block, "forward", recomputed))
        yield


def recomputed(below: Method) -> Method:
    """Return the method with gradient checkpointing around it."""
    return partial(checkpoint, below, use_reentrant=False)
