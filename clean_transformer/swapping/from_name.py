"""What to swap in, by name: a variant of ours, or a class or function in a file of one's own."""

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

from clean_transformer.modules.contract import SwapError
from clean_transformer.swapping.swaps import Make


@contextmanager
def chosen_make(name: str) -> Iterator[Make]:
    """What `swap` takes: "variants.ReluMLP", or "my_file.py:MyAttention".

    Raises `ValueError` for a file or a name that there is not, and for every error that one's own
    file makes when it is read or within the `with` block, with its line.
    """
    file, colon, attribute = name.rpartition(":")
    if not colon:
        yield variant(name)
        return
    try:
        yield from_file(Path(file).absolute(), attribute)
    except Exception as error:
        told = isinstance(error, SwapError) and error.__cause__  # by its message
        line = line_in(Path(file).absolute(), told or error)
        if line is None:
            raise
        kind = "" if told else f"{type(error).__name__}: "
        message = getattr(error, "msg", error)  # a SyntaxError would say the line again
        raise ValueError(f"{file}, line {line}: {kind}{message}") from error


def variant(name: str) -> Make:
    """The class that "variants.NAME" names. Raises `ValueError` if there is none."""
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
    """The class or function of that name in a Python file, which may import from its folder.

    Raises `ValueError` if there is none.
    """
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"there is no Python file {str(file)!r}; give FILE.py:NAME")
    spec = spec_from_file_location(str(file), file)
    module = module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[module.__name__] = module  # where dataclasses look for it
    sys.path.insert(0, str(file.parent))
    module.__loader__.exec_module(module)  # type: ignore[union-attr]
    if not callable(getattr(module, name, None)):
        known = [word for word, value in vars(module).items() if callable(value)]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
        raise ValueError(f"{file} has no class or function {name!r}; did you mean one of {near}?")
    return getattr(module, name)


def line_in(file: Path, error: BaseException) -> int | None:
    """The line of the file that an error came through last; None if it did not."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    return lines[-1] if lines else None
