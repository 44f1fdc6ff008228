"""`Swapped`, which describes one swapped module, and functions that list swapped modules."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from clean_transformer.reports.page import in_words
from clean_transformer.swapping.libraries.base import Adapter
from clean_transformer.swapping.parameters import Parameters


@dataclass(frozen=True)
class Swapped:
    """One swapped module: its path, and the class names of the old and the new module.

    `parameters` compares the parameters of the two modules. `looks_ahead` is True if the new
    module's output at a position depends on later positions, so that the model is not causal.
    """

    path: str
    old: str
    new: str
    parameters: Parameters = field(default_factory=Parameters)
    looks_ahead: bool = False


def by_parameters(swapped: Iterable[Swapped]) -> dict[str, list[str]]:
    """Return a dictionary from a sentence about the parameters to the paths for which it holds.

    Modules that look ahead have a sentence about this, too.
    """
    groups: dict[str, list[str]] = {}
    for each in swapped:
        said = str(each.parameters)
        if each.looks_ahead:
            said += "; LOOKS AHEAD: its output at a position depends on later positions"
        groups.setdefault(said, []).append(each.path)
    return groups


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
