"""Finds the `Library` for a model. The other files in this folder define one `Library` each."""

import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module

from torch import nn

from clean_transformer.swapping import libraries
from clean_transformer.swapping.libraries.base import Adapter, Library, class_names


@cache
def known_libraries() -> tuple[Library, ...]:
    """Return one instance of every subclass of `Library` that a file in this folder defines."""
    files = [
        import_module(f"{libraries.__name__}.{file.name}")
        for file in pkgutil.iter_modules(libraries.__path__)
    ]
    return tuple(
        value()
        for file in files
        for value in vars(file).values()
        # In Python 3.10, list[int] is an instance of `type`, and `issubclass` does not accept it.
        if isinstance(value, type)
        and Library in value.__mro__
        and value.__module__ == file.__name__
        and not inspect.isabstract(value)
    )


@cache
def adapters() -> Mapping[tuple[str, str], type[Adapter]]:
    """Return all adapters that give other libraries' modules the call signature of ours.

    The keys are pairs: the kind of the module, such as "attn", and the module's class name.
    """
    return {key: adapter for each in known_libraries() for key, adapter in each.AS_OURS.items()}


def library_of(model: nn.Module) -> Library | None:
    """Return the `Library` for the class of `model`, or None if there is none."""
    known = {name: each for each in known_libraries() for name in each.MODELS}
    return next((known[name] for name in class_names(model) if name in known), None)


def as_ours(kind: str, module: nn.Module) -> nn.Module:
    """Return `module` with the call signature of this package's modules of the same kind.

    `kind` is the kind of the module, such as "attn". If another library defines the module's class,
    the result may be an `Adapter` around `module`. Otherwise the result is `module` itself.
    """
    for name in class_names(module):
        if adapter := adapters().get((kind, name)):
            return adapter(module)
    return module
