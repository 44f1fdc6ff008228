"""Finds what to swap in by its name: one of our variants, or a class or function in a file."""

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

from clean_transformer.swapping.swaps import Make
from clean_transformer.swapping.trial import SwapError


@contextmanager
def chosen_make(name: str) -> Iterator[Make]:
    """The `make` for `swap` that "variants.ReluMLP" or "my_file.py:MyAttention" names.

    Raises `ValueError` if the file or the name does not exist. Errors that the file raises, when it
    is imported or within the `with` block, become a `ValueError` with the file's line.
    """
    file, colon, attribute = name.rpartition(":")
    if not colon:
        yield variant(name)
        return
    try:
        yield from_file(Path(file).absolute(), attribute)
    except Exception as error:
        # The message of a `SwapError` already names the error that caused it.
        cause = isinstance(error, SwapError) and error.__cause__
        line = line_in(Path(file).absolute(), cause or error)
        if line is None:
            raise
        kind = "" if cause else f"{type(error).__name__}: "
        message = getattr(error, "msg", error)  # str() of a SyntaxError would repeat the line
        raise ValueError(f"{file}, line {line}: {kind}{message}") from error


def variant(name: str) -> Make:
    """The class that "variants.NAME" names. Raises `ValueError` if there is no such class."""
    variants = import_module("clean_transformer.variants")
    known = {
        f"variants.{word}": value
        for word, value in vars(variants).items()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and value.__module__.startswith(f"{variants.__name__}.")
    }
    if name not in known:
        raise ValueError(
            f"there is no {name!r}; choose from {', '.join(known)}, or FILE.py:NAME for your own"
        )
    return known[name]


def from_file(file: Path, name: str) -> Make:
    """The class or function of that name in a Python file. The file can import from its folder.

    Raises `ValueError` if the file, or the class or function, does not exist.
    """
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"there is no Python file {str(file)!r}; give FILE.py:NAME")
    spec = spec_from_file_location(str(file), file)
    module = module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[module.__name__] = module  # dataclasses look the module up there
    sys.path.insert(0, str(file.parent))
    module.__loader__.exec_module(module)  # type: ignore[union-attr]
    if not callable(getattr(module, name, None)):
        known = [word for word, value in vars(module).items() if callable(value)]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
        raise ValueError(f"{file} has no class or function {name!r}; did you mean one of {near}?")
    return getattr(module, name)


def line_in(file: Path, error: BaseException) -> int | None:
    """The last line of the file in an error's traceback, or None if the file is not in it."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    return lines[-1] if lines else None
