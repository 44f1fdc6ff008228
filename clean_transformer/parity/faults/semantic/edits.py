"""Wrong GPT-2s: mistakes that people make in writing one, planted in our classes.

Each fault replaces methods of classes, or a function of a module, for as long as it is planted. So
it acts on every model, made before or after, on the explicit path and on the fused one; no stored
weight changes, and no other implementation of GPT-2 notices.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clean_transformer.model import DemoTransformer

Edit = Callable[[Tensor], Tensor]


# An owner, the name of its attribute, and what makes the faulty one of the right one.
Change = tuple[Any, str, Callable[[Any], Any]]


Changes = tuple[Change, ...]


@dataclass(frozen=True)
class SemanticFault:
    """A model that computes another function.

    `first` is the earliest activation that differs, as a pattern for `fnmatch`: a hook point, or
    the output of a LayerNorm, which has no hook point. One that is never computed differs too.
    `in_logits` is False where the mistake cancels, and the logits differ by rounding at most.
    """

    name: str
    description: str
    first: str
    changes: Changes
    in_logits: bool = True

    def plant(self) -> AbstractContextManager[Any]:
        """Within it, the fault."""
        return planted(self.changes)


@contextmanager
def planted(changes: Changes) -> Iterator[None]:
    """Within it, the changed attributes; after it, the right ones."""
    with ExitStack() as stack:
        for owner, attribute, change in changes:
            faulty = change(getattr(owner, attribute))
            stack.enter_context(replaced(owner, attribute, faulty))
        yield


@contextmanager
def replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """Within it, `owner` has another value for an attribute of its own."""
    original = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, original)


def weight_changed(
    relative: float, parameter: str = "blocks.0.mlp.W_in", index: tuple[int, ...] = (0, 0)
) -> AbstractContextManager[Any]:
    """Within it, every model computes with one weight element made 1 + `relative` times as large.

    For measuring how small a change is still found.
    """
    return planted(
        edited(DemoTransformer, {parameter: element(lambda w: w * (1 + relative), *index)})
    )


class _Bound(nn.Module):
    """A module that runs another one's original `forward`, so that parameters can be replaced."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        self.module = module
        self.original = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returned before it was faulty."""
        return self.original(self.module, *args, **kwargs)


def parameters(owner: type, edit: Callable[[Any], dict[str, Tensor]]) -> Changes:
    """Run with the parameters, by name, that `edit` makes from the module."""

    def change(forward: Any) -> Any:
        def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
            values = {f"module.{name}": value for name, value in edit(self).items()}
            return functional_call(_Bound(self, forward), values, args, kwargs)

        return faulty

    return ((owner, "forward", change),)


def edited(owner: type, edits: dict[str, Edit]) -> Changes:
    """Run with some parameters edited."""
    return parameters(
        owner, lambda module: {n: edit(module.get_parameter(n)) for n, edit in edits.items()}
    )


def mistaken(owner: type, others: dict[str, str]) -> Changes:
    """Run with some parameters taken for others."""
    return parameters(
        owner, lambda module: {name: module.get_parameter(n) for name, n in others.items()}
    )


def arguments(owner: type, edit: Edit) -> Changes:
    """Run on another first argument."""
    return (
        (owner, "forward", lambda forward: lambda self, x, *rest: forward(self, edit(x), *rest)),
    )


def result(owner: type, edit: Edit) -> Changes:
    """Return something else."""

    def change(forward: Any) -> Any:
        return lambda *args, **kwargs: edit(forward(*args, **kwargs))

    return ((owner, "forward", change),)


def child(owner: type, name: str, substitute: Callable[[Any], nn.Module]) -> Changes:
    """Run with another submodule in the place of one."""

    def change(forward: Any) -> Any:
        def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
            with replaced(self, name, substitute(getattr(self, name))):
                return forward(self, *args, **kwargs)

        return faulty

    return ((owner, "forward", change),)


def unchanged(activation: Tensor) -> Tensor:
    """The same."""
    return activation


def element(edit: Edit, *index: int) -> Edit:
    """Edit one element of a tensor."""

    def change(weight: Tensor) -> Tensor:
        changed = weight.clone()
        changed[index] = edit(weight[index])
        return changed

    return change


def without(*names: str) -> dict[str, Edit]:
    """Those parameters zero."""
    return dict.fromkeys(names, torch.zeros_like)


def reread(weight: Tensor) -> Tensor:
    """A matrix whose memory is read as the transposed matrix's, as between Conv1D and Linear."""
    return weight.T.reshape(weight.shape)
