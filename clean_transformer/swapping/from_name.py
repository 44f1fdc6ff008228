"""Finds the class or function with a given name, such as "variants.ReluMLP", to pass to `swap`."""

import difflib
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from torch import nn

from clean_transformer.swapping.making import Make
from clean_transformer.swapping.trial import SwapError


@contextmanager
def chosen_make(name: str) -> Iterator[Make]:
    """Yield the class or function with the given `name`, to pass to `swap` as `make`.

    `name` is, for example, "variants.ReluMLP" or "my_file.py:MyAttention". Raises `ValueError` if
    the file, the class or the function does not exist. If the code in the file raises an error,
    during the import or in the `with` block, a `ValueError` says in which line of the file.
    """
    file, colon, attribute = name.rpartition(":")
    if not colon:
        yield variant(name)
        return
    try:
        yield from_file(Path(file).absolute(), attribute)
    except Exception as error:
        # The message of a `SwapError` already contains the type and text of its cause.
        cause = isinstance(error, SwapError) and error.__cause__
        line = line_in(Path(file).absolute(), cause or error)
        if line is None:
            raise
        kind = "" if cause else f"{type(error).__name__}: "
        message = getattr(error, "msg", error)  # str() of a SyntaxError repeats the line number
        raise ValueError(f"{file}, line {line}: {kind}{message}") from error


def variant(name: str) -> Make:
    """Return the class in `clean_transformer.variants` for a name such as "variants.ReluMLP".

    Raises `ValueError` if there is no such class.
    """
    variants = import_module("clean_transformer.variants")
    known: dict[str, type[nn.Module]] = {
        f"variants.{word}": value
        for word, value in vars(variants).items()
        # In Python 3.10, list[int] is a class to `inspect`, and `issubclass` does not accept it.
        if inspect.isclass(value)
        and nn.Module in value.__mro__
        and value.__module__.startswith(f"{variants.__name__}.")
    }
    if name not in known:
        raise ValueError(
            f"there is no {name!r}; choose from {', '.join(known)}, or FILE.py:NAME for your own"
        )
    return known[name]


def from_file(file: Path, name: str) -> Make:
    """Import a Python file, and return the class or function called `name` in the file.

    The file can import other files in its folder. Raises `ValueError` if the file does not exist,
    or if the file has no such class or function.
    """
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"there is no Python file {str(file)!r}; give FILE.py:NAME")
    spec = spec_from_file_location(str(file), file)
    module = module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[module.__name__] = module  # `dataclass` looks here for a class's module
    sys.path.insert(0, str(file.parent))
    module.__loader__.exec_module(module)  # type: ignore[union-attr]
    if not callable(getattr(module, name, None)):
        known = [word for word, value in vars(module).items() if callable(value)]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
        raise ValueError(f"{file} has no class or function {name!r}; did you mean one of {near}?")
    return getattr(module, name)


def line_in(file: Path, error: BaseException) -> int | None:
    """Return the number of the last line of `file` in the error's traceback, or None."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    return lines[-1] if lines else None
