"""Copies weights from old modules to the new modules that `swap` made from a class."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.swapping.trial import SwapError


class WeightsNotCopied(UserWarning):
    """Warns that `swap` could not copy all parameters of a new module from the old module.

    Parameters that were not copied keep the values from the constructor of the new module.
    """


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
    left = []
    for name, parameter in new.named_parameters():
        weight = weights.get(name, attribute(old, name))
        if isinstance(weight, Tensor) and weight.shape == parameter.shape:
            parameter.copy_(weight)
        else:
            left.append(name)
    if left and len(left) == len([*new.parameters()]):
        raise SwapError(
            f"{path}: no weight can be copied to {names}, because the names or shapes of "
            f"{', '.join(left)} differ; define load_from(old) in the class, or give a function "
            "(old, path) that returns the new module"
        )
    return left


def attribute(module: nn.Module, path: str) -> object:
    """Return the attribute of `module` at a dotted path, or None if there is no such attribute."""
    try:
        return attrgetter(path)(module)
    except AttributeError:
        return None
