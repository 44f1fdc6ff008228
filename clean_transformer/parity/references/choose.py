"""Every reference by name, found in the files of this folder, and the choice of one."""

from importlib import import_module
from pkgutil import iter_modules

from clean_transformer.parity import references
from clean_transformer.parity.references.base import Implementation


def implementations() -> list[Implementation]:
    """The `IMPLEMENTATION` of every file of this folder that has one, by rank."""
    files = [
        import_module(f"{references.__name__}.{file.name}")
        for file in iter_modules(references.__path__)
        if file.name != "choose"
    ]
    found = [vars(file)["IMPLEMENTATION"] for file in files if "IMPLEMENTATION" in vars(file)]
    return sorted(found, key=lambda implementation: (implementation.rank, implementation.name))


IMPLEMENTATIONS = implementations()
REFERENCES = {each.name: each.build for each in IMPLEMENTATIONS}


def choose_reference(name: str) -> tuple[str | None, str]:
    """The name of a reference, or None with the reason; "auto" chooses one that is installed.

    Raises `ValueError` for a name that no reference has.
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
