"""Finds the other implementations of GPT-2 in this folder, and chooses one by name."""

from importlib import import_module
from pkgutil import iter_modules

from clean_transformer.parity import references
from clean_transformer.parity.references.base import Implementation


def implementations() -> list[Implementation]:
    """Return the `IMPLEMENTATION` of each file in this folder that has one, sorted by rank."""
    files = [
        import_module(f"{references.__name__}.{file.name}")
        for file in iter_modules(references.__path__)
        if file.name != "choose"
    ]
    found = [vars(file)["IMPLEMENTATION"] for file in files if "IMPLEMENTATION" in vars(file)]
    return sorted(found, key=lambda implementation: (implementation.rank, implementation.name))


IMPLEMENTATIONS = implementations()
REFERENCES = {each.name: each.build for each in IMPLEMENTATIONS}
READERS = {each.name: each.read for each in IMPLEMENTATIONS}


def choose_reference(name: str) -> tuple[str | None, str]:
    """Return (name of an implementation, ""), or (None, reason) if none is chosen.

    The name "auto" chooses the installed implementation with the lowest `Implementation.rank`. The
    name "none" chooses no implementation. Raises `ValueError` for an unknown name.
    """
    if name == "none":
        return None, "no reference was asked for"
    if name == "auto":
        installed = [each.name for each in IMPLEMENTATIONS if each.is_installed()]
        if installed:
            return installed[0], ""
        return None, "no reference is installed; install the extra 'bridge'"
    if name not in REFERENCES:
        raise ValueError(f"no reference {name!r}; choose from auto, none, {', '.join(REFERENCES)}")
    return name, ""
