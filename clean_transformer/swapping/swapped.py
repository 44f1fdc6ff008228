"""`Swapped`, which describes one swapped module, and functions that list several in a text."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from clean_transformer.reports.page import in_words
from clean_transformer.swapping.libraries.base import Adapter


@dataclass(frozen=True)
class Swapped:
    """One swapped module: its path, and the class names of the old and the new module."""

    path: str
    old: str
    new: str


def by_classes(swapped: Iterable[Swapped]) -> dict[tuple[str, str], list[str]]:
    """Return a dictionary from (old class name, new class name) to the paths of these swaps."""
    groups: dict[tuple[str, str], list[str]] = {}
    for each in swapped:
        groups.setdefault((each.old, each.new), []).append(each.path)
    return groups


def in_one_line(swapped: Iterable[Swapped]) -> str:
    """Return a text that lists the swapped modules, such as "MLP → ReluMLP at blocks.0.mlp"."""
    return "; ".join(
        f"{old} → {new} at {in_words(paths)}" for (old, new), paths in by_classes(swapped).items()
    )


def class_name(module: nn.Module) -> str:
    """Return the name of the module's class. For an `Adapter`, use the module that it wraps."""
    return type(module.module if isinstance(module, Adapter) else module).__name__
