"""`SemanticFault`, and the edits of our classes that faults are made of.

While a fault is planted, it replaces methods of our classes or functions of our modules. So it acts
on every model, made before or after, on the explicit path and on the fused path. Stored weights do
not change, and other implementations of GPT-2 do not notice.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Edit = Callable[[Tensor], Tensor]
# A class or a module, the name of an attribute, and a function from the right to the faulty value.
Change = tuple[Any, str, Callable[[Any], Any]]
Changes = tuple[Change, ...]


@dataclass(frozen=True)
class SemanticFault:
    """A mistake that makes the model another function.

    `first` is the first activation that differs, as a pattern for `fnmatch`. It is a hook point or
    a LayerNorm, for its output. An activation that is no longer computed counts as different.
    """

    name: str
    description: str
    first: str
    changes: Changes

    def plant(self) -> AbstractContextManager[Any]:
        """Plant the fault for the length of a `with` block."""
        return planted(self.changes)


@contextmanager
def planted(changes: Changes) -> Iterator[None]:
    """Make the changes for the length of a `with` block."""
    with ExitStack() as stack:
        for owner, attribute, change in changes:
            faulty = change(getattr(owner, attribute))
            stack.enter_context(replaced(owner, attribute, faulty))
        yield


@contextmanager
def replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """Give `owner` another value of an attribute for the length of a `with` block."""
    original = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, original)


class _Bound(nn.Module):
    """Runs the original `forward` of a module, so that `functional_call` can replace parameters."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        self.module = module
        self.original = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The result of the original `forward`."""
        return self.original(self.module, *args, **kwargs)


def parameters(owner: type, edit: Callable[[Any], dict[str, Tensor]]) -> Changes:
    """`owner` runs with the parameters that `edit(module)` returns by name."""

    def change(forward: Any) -> Any:
        def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
            values = {f"module.{name}": value for name, value in edit(self).items()}
            return functional_call(_Bound(self, forward), values, args, kwargs)

        return faulty

    return ((owner, "forward", change),)


def edited(owner: type, edits: dict[str, Edit]) -> Changes:
    """`owner` runs with some parameters edited."""
    return parameters(
        owner, lambda module: {n: edit(module.get_parameter(n)) for n, edit in edits.items()}
    )


def mistaken(owner: type, others: dict[str, str]) -> Changes:
    """`owner` runs with some parameters in the places of others: {place: parameter}."""
    return parameters(
        owner, lambda module: {name: module.get_parameter(n) for name, n in others.items()}
    )


def arguments(owner: type, edit: Edit) -> Changes:
    """`owner` runs on an edited first argument."""

    def change(forward: Any) -> Any:
        return lambda self, x, *args, **kwargs: forward(self, edit(x), *args, **kwargs)

    return ((owner, "forward", change),)


def result(owner: type, edit: Edit) -> Changes:
    """`owner` returns an edited result."""

    def change(forward: Any) -> Any:
        return lambda *args, **kwargs: edit(forward(*args, **kwargs))

    return ((owner, "forward", change),)


def child(owner: type, name: str, substitute: Callable[[Any], nn.Module]) -> Changes:
    """`owner` runs with a substitute for one of its submodules."""

    def change(forward: Any) -> Any:
        def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
            with replaced(self, name, substitute(getattr(self, name))):
                return forward(self, *args, **kwargs)

        return faulty

    return ((owner, "forward", change),)


def unchanged(activation: Tensor) -> Tensor:
    """The activation itself."""
    return activation


def element(edit: Edit, *index: int) -> Edit:
    """An edit of one element, or of one slice, of a tensor."""

    def change(weight: Tensor) -> Tensor:
        changed = weight.clone()
        changed[index] = edit(weight[index])
        return changed

    return change


def without(*names: str) -> dict[str, Edit]:
    """Edits that set those parameters to zero."""
    return dict.fromkeys(names, torch.zeros_like)


def reread(weight: Tensor) -> Tensor:
    """A matrix whose memory is read as that of its transpose, as between Conv1D and Linear."""
    return weight.T.reshape(weight.shape)
