"""Packages that import what they offer only when somebody asks for it."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import get_data


def lazy_names(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package whose imports are lazy.

    The package lists its public names once, where type checkers and editors find them:

        if TYPE_CHECKING:
            from clean_transformer.config import Config as Config
        else:
            __getattr__, __dir__, __all__ = lazy_names(__name__)

    `lazy_names` reads that list from the package's source. The first use of a name imports its
    module and keeps the value, so that later uses cost nothing.
    """
    module = sys.modules[package]
    # Not `__loader__.get_source`: pytest loads plugins by a loader that has no such method. And not
    # `Path(__file__)`: a package in a zip file has no file of its own.
    source = get_data(package, "__init__.py")
    assert source is not None, f"the source of {package} cannot be read"
    homes = {
        alias.asname: str(node.module)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }

    def get(name: str) -> object:
        if name not in homes:
            message = f"module {package!r} has no attribute {name!r}"
            raise AttributeError(message, name=name, obj=module)
        if homes[name] == package:
            value: object = import_module(f"{package}.{name}")
        else:
            value = getattr(import_module(homes[name]), name)
        setattr(module, name, value)
        return value

    def names() -> list[str]:
        special = [name for name in vars(module) if name.startswith("__")]
        return sorted({*special, *homes})

    return get, names, [*homes]
