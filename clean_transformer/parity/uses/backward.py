"""Runs a backward pass of the whole model, and keeps what flows through each part of the model."""

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
    """What flows through one part of the model in a forward and a backward pass.

    `given` and `output` are the part's input and output. `of_given` and `of_output` are the
    gradients of the loss with respect to them.
    """

    given: Tensor
    output: Tensor
    of_given: Tensor
    of_output: Tensor


@dataclass(frozen=True)
class Backward:
    """A backward pass of the whole model.

    `loss` is the mean loss. `flows` has the flow through each block, the last LayerNorm and the
    unembedding, except through parts at which no gradient arrived. `gradients` has the gradients of
    the parameters that were asked for. `missing` names the parameters at which no gradient arrived.
    `cut` names the places between two parts where the gradient was lost or changed.
    """

    loss: Tensor
    flows: dict[str, Flow]
    gradients: dict[str, Tensor]
    missing: list[str]
    cut: list[str]


def run_backward(
    model: DemoTransformer, tokens: Tensor, targets: Tensor, keeps: Callable[[str], bool]
) -> Backward:
    """Run the model forward and backward, and keep the gradients of some parameters.

    `keeps(name)` says whether the gradient of the parameter `name` is kept. All other gradients are
    freed at once, to save memory. The gradients are those of the sum of the losses of all
    positions, because many gradients of the mean would be too small for float16.
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
        if keeps(name) and parameter.grad is not None:
            gradients[name] = parameter.grad
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
        # As in training, autocast is only for the logits.
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
    """Return the gradients of a part with respect to its input and, for a module, its parameters.

    `of_output` is the gradient with respect to the part's output; None means 1, for a scalar.
    """
    with torch.enable_grad():
        given = given.detach().requires_grad_()
        parameters = function.parameters() if isinstance(function, nn.Module) else ()
        return torch.autograd.grad(function(given), [given, *parameters], of_output)
