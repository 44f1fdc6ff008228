"""Refuses unknown keyword arguments with the name of the called function and the nearest name."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import Any, TypeVar

from clean_transformer.support.left_out import refuse_known

Function = TypeVar("Function", bound=Callable[..., Any])
Class = TypeVar("Class", bound=type)


def refuse_unknown(function: str, arguments: Iterable[str], known: Iterable[str]) -> None:
    """Raise `TypeError` for the first name in `arguments` that is not in `known`.

    The message names the called `function`, and the most similar name in `known`. For an argument
    of TransformerLens that we lack, the message says what to use instead.
    """
    unknown = [name for name in arguments if name not in known]
    refuse_known(function, unknown)
    for name in unknown:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; {hint}")


def keywords(*functions: Callable[..., Any]) -> list[str] | None:
    """Return the names of all keyword arguments of the functions, without `self` and `cls`.

    Returns None if the last function takes any keyword argument, with `**`.
    """
    parameters = [each for f in functions for each in signature(f).parameters.values()]
    last = [*signature(functions[-1]).parameters.values()]
    if last and last[-1].kind is Parameter.VAR_KEYWORD:
        return None
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    names = (each.name for each in parameters if each.kind in named)
    return [name for name in dict.fromkeys(names) if name not in ("self", "cls")]


def checks_keywords(function: Function) -> Function:
    """Decorate a function so that it refuses unknown keyword arguments (see `refuse_unknown`)."""
    known = keywords(function)
    assert known is not None

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        refuse_unknown(function.__name__, kwargs, known)
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def checks_fields(settings: Class) -> Class:
    """Decorate a dataclass so that it refuses unknown fields (see `refuse_unknown`)."""
    init: Any = settings.__init__
    known = keywords(init)
    assert known is not None

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if any(name not in known for name in kwargs):
            refuse_unknown(settings.__name__, kwargs, known)
        init(self, *args, **kwargs)

    settings.__init__ = checked
    return settings
