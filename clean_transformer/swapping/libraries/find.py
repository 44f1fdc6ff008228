"""Finds the `Library` that supports a model. The files in this folder define the libraries."""

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
        if isinstance(value, type)
        and issubclass(value, Library)
        and value.__module__ == file.__name__
        and not inspect.isabstract(value)
    )


@cache
def adapters() -> Mapping[tuple[str, str], type[Adapter]]:
    """Return the entries of `Library.AS_OURS` of all libraries, in one dictionary."""
    return {key: adapter for each in known_libraries() for key, adapter in each.AS_OURS.items()}


def library_of(model: nn.Module) -> Library | None:
    """Return the `Library` that supports `model`, or None if no library supports `model`."""
    known = {name: each for each in known_libraries() for name in each.MODELS}
    return next((known[name] for name in class_names(model) if name in known), None)


def as_ours(kind: str, module: nn.Module) -> nn.Module:
    """Return `module` with our call signature.

    If `adapters()` has an adapter for `kind` and the module's class, the adapter wraps `module`.
    Otherwise the result is `module` itself.
    """
    for name in class_names(module):
        if adapter := adapters().get((kind, name)):
            return adapter(module)
    return module
