"""`names_settings`: a decorator that shows the fields of `Sampling` in a function's signature."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, get_type_hints

from clean_transformer.support.keywords import refuse_unknown
from clean_transformer.text.settings import Sampling

Function = TypeVar("Function", bound=Callable[..., Any])


def names_settings(function: Function) -> Function:
    """Decorate a function so that its signature lists the fields of `Sampling` as parameters.

    The last parameter of `function` must be `**sampling`. In the signature, the fields of
    `Sampling` replace this parameter, so that `help()` shows the type and the default of each
    field. For an unknown keyword argument, the decorated function raises `TypeError` before it
    calls `function`. The error message suggests the parameter with the most similar name. For an
    argument that only TransformerLens has, the message says what to use instead.
    """
    shown = signature(function)
    *parameters, _ = shown.parameters.values()
    types = get_type_hints(Sampling)  # the types without the help texts
    settings = [
        setting.replace(annotation=types[name])
        for name, setting in signature(Sampling).parameters.items()
    ]
    shown = shown.replace(parameters=[*parameters, *settings])

    known = [name for name in shown.parameters if name != "self"]

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        refuse_unknown(function.__name__, kwargs, known)
        return function(*args, **kwargs)

    checked.__signature__ = shown  # type: ignore[attr-defined]
    return checked  # type: ignore[return-value]
