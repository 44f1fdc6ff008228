"""Defines `SemanticFault`, and functions that return the changes to our code that plant a fault.

A planted fault replaces methods of our classes, or functions in our files. So the fault affects all
our models, including the models that were made before the fault was planted. The fault does not
change the stored weights, and it does not affect TransformerLens or transformers.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clean_transformer.support.replaced import replaced

# A function that takes a tensor and returns a changed tensor.
Edit = Callable[[Tensor], Tensor]
# A change is a tuple (owner, attribute, function). The owner is a class or a Python module. The
# attribute is the name of the owner's attribute that is replaced. The function takes the correct
# value of this attribute and returns the faulty value.
Change = tuple[Any, str, Callable[[Any], Any]]
Changes = tuple[Change, ...]


@dataclass(frozen=True)
class SemanticFault:
    """A mistake in the model's code: with this mistake, the model computes another function.

    `first` is an `fnmatch` pattern for the name of the first activation that the mistake changes or
    removes. This is the name of a hook point, such as "blocks.0.hook_mlp_out", or the name of a
    LayerNorm, such as "ln_final", for the LayerNorm's output. `changes` has the changes to our code
    that plant the fault.
    """

    name: str
    description: str
    first: str
    changes: Changes

    def plant(self) -> AbstractContextManager[Any]:
        """Return a context manager that plants the fault inside a `with` block."""
        return planted(self.changes)


@contextmanager
def planted(changes: Changes) -> Iterator[None]:
    """Make the changes at the start of a `with` block, and undo the changes at its end."""
    with ExitStack() as stack:
        for owner, attribute, change in changes:
            faulty = change(getattr(owner, attribute))
            stack.enter_context(replaced(owner, attribute, faulty))
        yield


class _Bound(nn.Module):
    """Wraps a module. A call runs the module's original `forward`, not the faulty replacement."""

    # While a fault is planted, the class has a faulty `forward`, which calls `functional_call`. If
    # `functional_call` ran the module itself, the faulty `forward` would call itself without end.
    def __init__(self, module: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        self.module = module
        self.original = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original `forward` on the wrapped module."""
        return self.original(self.module, *args, **kwargs)


def parameters(owner: type, edit: Callable[[Any], dict[str, Tensor]]) -> Changes:
    """Return `Changes` with which all modules of class `owner` run with other parameters.

    `edit(module)` returns the new values of some parameters by name. The other parameters keep
    their values.
    """

    def change(forward: Any) -> Any:
        def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
            values = {f"module.{name}": value for name, value in edit(self).items()}
            return functional_call(_Bound(self, forward), values, args, kwargs)

        return faulty

    return ((owner, "forward", change),)


def edited(owner: type, edits: dict[str, Edit]) -> Changes:
    """Return changes to the code that make modules of the class `owner` run with edited parameters.

    `edits` maps the name of a parameter to a function that returns the new value of the parameter.
    """
    return parameters(
        owner, lambda module: {n: edit(module.get_parameter(n)) for n, edit in edits.items()}
    )


def mistaken(owner: type, others: dict[str, str]) -> Changes:
    """Return changes to the code that make every module of the class `owner` mix up its parameters.

    For each `name` in `others`, the module uses the parameter called `others[name]` in place of the
    parameter called `name`.
    """
    return parameters(
        owner, lambda module: {name: module.get_parameter(n) for name, n in others.items()}
    )


def arguments(owner: type, edit: Edit) -> Changes:
    """Return changes to the code that edit the first argument of the `forward` of `owner`."""

    def change(forward: Any) -> Any:
        return lambda self, x, *args, **kwargs: forward(self, edit(x), *args, **kwargs)

    return ((owner, "forward", change),)


def result(owner: type, edit: Edit, method: str = "forward") -> Changes:
    """Return changes to the code that edit what `method` of the class `owner` returns."""

    def change(right: Any) -> Any:
        return lambda *args, **kwargs: edit(right(*args, **kwargs))

    return ((owner, method, change),)


def child(owner: type, name: str, substitute: Callable[[Any], nn.Module]) -> Changes:
    """Return changes to the code that replace the submodule `name` in modules of the class `owner`.

    `substitute(submodule)` returns the module that replaces the submodule.
    """

    def change(forward: Any) -> Any:
        def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
            with replaced(self, name, substitute(getattr(self, name))):
                return forward(self, *args, **kwargs)

        return faulty

    return ((owner, "forward", change),)


def unchanged(activation: Tensor) -> Tensor:
    """Return the activation itself."""
    return activation


def element(edit: Edit, *index: int) -> Edit:
    """Return a function that applies `edit` only to the element or slice of a tensor at `index`."""

    def change(weight: Tensor) -> Tensor:
        changed = weight.clone()
        changed[index] = edit(weight[index])
        return changed

    return change


def without(*names: str) -> dict[str, Edit]:
    """Return edits for `edited` that set the parameters called `names` to zero."""
    return dict.fromkeys(names, torch.zeros_like)


def reread(weight: Tensor) -> Tensor:
    """Return `weight.T`, reshaped to the shape of `weight`.

    People make this mistake when they convert a Conv1D weight [in out] to a Linear weight [out in],
    or back: they reshape the weight instead of transposing it.
    """
    return weight.T.reshape(weight.shape)
