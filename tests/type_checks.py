"""Makes the type checks of the tests cheap: jaxtyping checks only the signatures with shapes.

jaxtyping's import hook decorates every function of the package with `jaxtyping.jaxtyped`. This
takes 2 ms for each function, and 5 µs more for each of its calls. A function inside a function is
even decorated whenever the outer function runs. Importing this module replaces the decorator: if a
signature has no shapes, beartype alone checks its types, which takes 0.8 ms and 0.4 µs. A function
inside a function is decorated only when the outer function runs for the first time.
"""

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial, wraps
from types import CodeType
from typing import Any

import jaxtyping

jaxtyped = jaxtyping.jaxtyped

# A part of the path of each file of the package. jaxtyping's own functions are in other files.
PACKAGE = "clean_transformer"
# The code of the functions inside functions that are already decorated once.
decorated: set[CodeType] = set()


def has_shapes(function: Callable[..., Any]) -> bool:
    """Whether an annotation has a shape. A name in quotes may have one, except the own class's."""
    own = function.__qualname__.split(".")
    annotations = function.__annotations__.values()
    return any(
        each not in own if isinstance(each, str) else "jaxtyping." in repr(each)
        for each in annotations
    )


def checked(function: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """Decorate a function or a class, as `jaxtyping.jaxtyped` does, so that calls check types."""
    check = partial(checked, typechecker=typechecker)
    if function is None:
        return check
    if isinstance(function, classmethod | staticmethod):
        return type(function)(check(function.__func__))
    if isinstance(function, property):
        parts = function.fget, function.fset, function.fdel
        return property(*(part and check(part) for part in parts))
    if inspect.isclass(function):
        # Like jaxtyping, which decorates only the `__init__` of dataclasses, and only once.
        if is_dataclass(function) and not hasattr(function.__init__, "__wrapped__"):
            function.__init__ = check(function.__init__)
        return function
    code = getattr(function, "__code__", None)
    if code is not None and "<locals>" in function.__qualname__ and PACKAGE in code.co_filename:
        if code in decorated:
            return function
        decorated.add(code)
    if not inspect.isfunction(function) or has_shapes(function):
        return jaxtyped(function, typechecker=typechecker)
    with_checks = typechecker(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else with_checks)(*args, **kwargs)

    return call


jaxtyping.jaxtyped = checked
