"""Makes the type checks of the tests cheap: jaxtyping checks only the signatures with shapes.

jaxtyping's import hook decorates every function of the package with `jaxtyping.jaxtyped`. Each call
of such a function takes about 50 µs longer, because jaxtyping remembers the length of each axis.
Importing this module replaces the decorator. If a signature has no shapes, beartype alone now
checks its types, which takes about 1 µs.
"""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jaxtyping

jaxtyped = jaxtyping.jaxtyped


def has_shapes(function: Callable[..., Any]) -> bool:
    """Whether an annotation has a shape. Annotations in quotes count, because they may have one."""
    annotations = function.__annotations__.values()
    return any(isinstance(each, str) or "jaxtyping." in repr(each) for each in annotations)


def checked(function: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """Decorate a function or a class, as `jaxtyping.jaxtyped` does, so that calls check types."""
    if function is None:
        return partial(checked, typechecker=typechecker)
    if inspect.isclass(function) and getattr(function.__init__, "__globals__", None) is globals():
        return function  # like jaxtyping, which decorates no `__init__` twice
    if not inspect.isfunction(function) or has_shapes(function):
        return jaxtyped(function, typechecker=typechecker)
    with_checks = typechecker(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else with_checks)(*args, **kwargs)

    return call


jaxtyping.jaxtyped = checked
