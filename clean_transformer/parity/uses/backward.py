"""Runs a forward and a backward pass, and records the activations and gradients of each block."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.model import DemoTransformer
from clean_transformer.training.loss import cross_entropy


@dataclass(frozen=True)
class Flow:
    """The input and the output of one module, such as a block, and the gradients of both.

    `given` is the input. `of_given` is the gradient of the loss with respect to the input.
    `of_output` is the gradient with respect to the output.
    """

    given: Tensor
    output: Tensor
    of_given: Tensor
    of_output: Tensor


@dataclass(frozen=True)
class Backward:
    """The result of a forward and a backward pass of the whole model.

    `loss` is the mean of the losses at all positions. The gradients are those of the sum of losses.
    `flows` maps the names of modules ("blocks.0", …, "ln_final" and "unembed") to their inputs,
    outputs and gradients. Modules that received no gradient are left out. `gradients` maps the
    names of parameters to the parts of their gradients that `kept` chose (see `run_backward`).
    `missing` has the names of the parameters that received no gradient. `cut` lists the places
    between two modules where the gradient was lost or changed, such as "ln_final to blocks.11".
    """

    loss: Tensor
    flows: dict[str, Flow]
    gradients: dict[str, Tensor]
    missing: list[str]
    cut: list[str]


def run_backward(
    model: DemoTransformer, tokens: Tensor, targets: Tensor, kept: Callable[[str], Any]
) -> Backward:
    """Run the model forward and backward, and keep the gradients of some parameters.

    `kept(name)` is the index of the elements to keep of the gradient of the parameter `name`, or
    None to keep nothing. All other gradients are freed at once, to save memory. The gradients are
    those of the sum of the losses at all positions, because many gradients of the mean loss would
    be too small for float16.
    """
    given: dict[str, Tensor] = {}
    output: dict[str, Tensor] = {}
    of_given: dict[str, Tensor] = {}
    of_output: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    arrived: set[str] = set()

    def before(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        given[name] = args[0].detach()
        if args[0].requires_grad:
            args[0].register_hook(partial(of_given.__setitem__, name))

    def after(name: str, _: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        output[name] = result.detach()
        if result.requires_grad:
            result.register_hook(partial(of_output.__setitem__, name))  # type: ignore[no-untyped-call]

    def accumulated(name: str, parameter: Tensor) -> None:
        arrived.add(name)
        index = kept(name)
        if index is not None and parameter.grad is not None:
            gradients[name] = parameter.grad[index]
        parameter.grad = None

    parts = (*(f"blocks.{layer}" for layer in range(len(model.blocks))), "ln_final", "unembed")
    with ExitStack() as hooks, torch.enable_grad():
        for name in parts:
            part = model.get_submodule(name)
            hooks.callback(part.register_forward_pre_hook(partial(before, name)).remove)
            hooks.callback(part.register_forward_hook(partial(after, name)).remove)
        for name, parameter in model.named_parameters():
            parameter.grad = None
            hook = parameter.register_post_accumulate_grad_hook(partial(accumulated, name))  # type: ignore[no-untyped-call]
            hooks.callback(hook.remove)
        logits = model(tokens)
        # As in training, autocast is on only while the model computes the logits.
        with torch.autocast(tokens.device.type, enabled=False):
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
            torch.autograd.backward(loss, torch.full_like(loss, targets.numel()))
    flows = {
        name: Flow(given[name], output[name], of_given[name], of_output[name])
        for name in parts
        if name in of_given and name in of_output
    }
    cut = [
        f"{theirs} to {ours}"
        for ours, theirs in pairwise(parts)
        if not (ours in of_output and theirs in of_given)
        or not torch.equal(of_output[ours], of_given[theirs])
    ]
    missing = [name for name, _ in model.named_parameters() if name not in arrived]
    return Backward(loss.detach(), flows, gradients, missing, cut)


def gradients_of(
    function: Callable[[Tensor], Tensor], given: Tensor, of_output: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Run `function` on `given`, and return the gradients of a loss.

    `of_output` is the gradient of the loss with respect to the output of `function`. If
    `of_output` is None, the output is the loss itself, and must be a scalar. The first result is
    the gradient with respect to `given`. If `function` is a module, the gradients with respect to
    its parameters follow.
    """
    with torch.enable_grad():
        given = given.detach().requires_grad_()
        parameters = function.parameters() if isinstance(function, nn.Module) else ()
        return torch.autograd.grad(function(given), [given, *parameters], of_output)
