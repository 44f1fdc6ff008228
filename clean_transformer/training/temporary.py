"""Context managers that change the state of a model or of PyTorch, and restore it at the end."""

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
    """Prepare the model's parameters for training, and restore the model's state at the end.

    At the start, the `grad` of every parameter becomes None. `unembed.b_U` gets no gradient,
    because GPT-2 has no such bias, and Hugging Face's format cannot store it. At the end, each
    module's train or eval mode and each parameter's `grad` and `requires_grad` are restored. There
    is one exception: if the model is sharded inside the `with` block, the model gets new
    parameters. The `grad` of these new parameters becomes None at the end.
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

    The list has the generator of the CPU and, on CUDA and MPS, the generator of `device`. The
    caller may seed these generators.
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
    """Let PyTorch use only kernels whose results are the same, bit for bit, in each run.

    PyTorch's earlier settings are restored at the end.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    config = os.environ.get(CUBLAS)
    os.environ.setdefault(CUBLAS, ":4096:8")  # cuBLAS needs such a setting to be deterministic
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        if config is None:
            os.environ.pop(CUBLAS, None)


@contextmanager
def recomputed_blocks(model: DemoTransformer) -> Iterator[None]:
    """Use gradient checkpointing in the `with` block: the forward pass stores only block inputs.

    The backward pass recomputes the other activations of each block. Therefore a training step
    takes about a third more time (Chen et al. 2016).
    """
    with ExitStack() as put:
        for block in model.blocks:
            put.enter_context(StandIn(block, "forward", recomputed))
        yield


def recomputed(below: Method) -> Method:
    """Return the method `below`, wrapped in gradient checkpointing."""
    return partial(checkpoint, below, use_reentrant=False)
