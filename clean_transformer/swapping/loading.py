"""Copies weights from the old modules, if `swap` got a class and made the new modules itself."""

import warnings
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.swapping.parameters import Parameters
from clean_transformer.swapping.trial import SwapError


class WeightsNotCopied(UserWarning):
    """Warns that `swap` could not copy all parameters of a new module from the old module.

    Parameters that were not copied keep the values from the constructor of the new module.
    """


class LayoutUnknown(UserWarning):
    """Warns that `swap` copied a square weight, whose shape does not show the order of its axes."""


@torch.no_grad()
def load(new: nn.Module, old: nn.Module, weights: Mapping[str, Tensor], path: str) -> list[str]:
    """Copy weights from `old` to `new`. Return the names of the parameters that were not copied.

    If the new module has a method `load_from`, this function only calls `new.load_from(old)`, and
    returns an empty list. Otherwise it copies every parameter that has the same name and shape in
    the old module, and returns the names of the new module's other parameters.

    `weights` maps this package's names for weights, such as "W_Q", to the weights of the old
    module. If a name is not in `weights`, the weight is the old module's attribute with this name.
    `path` is the path of the modules in the model, for error messages. Raises `SwapError` if
    `load_from` raises an error, or if no parameter can be copied.
    """
    names = f"{type(new).__name__} from {type(old).__name__}"
    load_from: Any = getattr(new, "load_from", None)
    if load_from is not None:
        try:
            load_from(old)
        except Exception as error:
            raise SwapError(
                f"{path}: load_from, which loads {names}, raised {type(error).__name__}: {error}"
            ) from error
        return []
    left, square = [], []
    for name, parameter in new.named_parameters():
        weight = weights.get(name, attribute(old, name))
        if isinstance(weight, Tensor) and weight.shape == parameter.shape:
            if weight.ndim > 1 and weight.shape[-1] == weight.shape[-2]:
                refuse_linear(name, new, old, path)
                square.append(name)
            parameter.copy_(weight)
        else:
            left.append(name)
    if square and not (isinstance(new, type(old)) or isinstance(old, type(new))):
        warnings.warn(
            f"{path}: {', '.join(square)} of {names} was copied as it is, but is square, so that "
            "its shape does not show whether the two classes mean the same axes. A weight of ours "
            "is [in, out], and a weight for F.linear is [out, in]; define load_from(old) in the "
            "class to be sure",
            LayoutUnknown,
            stacklevel=5,
        )
    if left and len(left) == len([*new.parameters()]):
        raise SwapError(
            f"{path}: no weight can be copied to {names}, because the names or shapes of "
            f"{', '.join(left)} differ; define load_from(old) in the class, or give a function "
            "(old, path) that returns the new module"
        )
    return left


def refuse_linear(name: str, new: nn.Module, old: nn.Module, path: str) -> None:
    """Raise `SwapError` if the square weight `name` is of an `nn.Linear` in only one module.

    The weight of `nn.Linear` is [out, in]. Every other module of GPT-2 has weights [in, out].
    """
    inside = name.rpartition(".")[0]
    owners = [attribute(module, inside) if inside else module for module in (new, old)]
    if isinstance(owners[0], nn.Linear) != isinstance(owners[1], nn.Linear):
        linear, other = (new, old) if isinstance(owners[0], nn.Linear) else (old, new)
        raise SwapError(
            f"{path}: {name} is [out, in] in {type(linear).__name__}, which has an nn.Linear, and "
            f"[in, out] in {type(other).__name__}; define load_from(old) in the class, or give a "
            "function (old, path) that returns the new module"
        )


def refuse_unset(new: nn.Module, parameters: Parameters, path: str) -> None:
    """Raise `SwapError` if a parameter in `parameters.new` or a buffer has NaN: it was never set.

    The module must have been made in the `with` block of `marked_memory`.
    """
    added = {name: new.get_parameter(name) for name in parameters.new}
    weights: dict[str, Tensor] = {**added, **dict(new.named_buffers())}
    unset = [name for name, weight in weights.items() if weight.isnan().any()]
    if unset:
        raise SwapError(
            f"{path}: {type(new).__name__} never sets {', '.join(unset)}, and the old module has "
            f"no weight with this name and shape ({parameters}); set it in the class, or name it "
            "as in the old module"
        )


def attribute(module: nn.Module, path: str) -> object:
    """Return the attribute of `module` at a dotted path, or None if there is no such attribute."""
    try:
        return attrgetter(path)(module)
    except AttributeError:
        return None
