"""Lazy imports: a package imports a public name when the name is used for the first time."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import get_data


def lazy_names(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for a package, so that its imports are lazy.

    The `__init__.py` of the package must import its public names as in this example, so that type
    checkers and editors find the names:

        if TYPE_CHECKING:
            from clean_transformer.config import Config as Config
        else:
            __getattr__, __dir__, __all__ = lazy_names(__name__)

    When a program runs, `TYPE_CHECKING` is False, so Python does not run these imports. Instead,
    `lazy_names` reads the names from the source of `__init__.py`. At the first use of a name,
    `__getattr__` imports the module that defines the name, and stores the value in the package.
    """
    module = sys.modules[package]
    # We cannot use `__loader__.get_source`, because pytest loads plugins with a loader that has no
    # such method. We cannot use `Path(__file__)`, because a package in a zip file has no such path.
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
