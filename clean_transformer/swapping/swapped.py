"""`Swapped`, which describes one swapped module, and functions that list swapped modules."""

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
    """Return the paths of the swapped modules, grouped by (old class name, new class name)."""
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
    """Return the name of the class of `module`, or of the wrapped module for an `Adapter`."""
    return type(module.module if isinstance(module, Adapter) else module).__name__
