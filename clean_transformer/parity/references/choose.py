"""TODO parity/references/choose."""

from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec

from clean_transformer.parity.references.base import _major_version
from clean_transformer.parity.references.hooked_transformer import hooked_transformer
from clean_transformer.parity.references.huggingface import huggingface
from clean_transformer.parity.references.transformer_bridge import transformer_bridge

REFERENCES = {
    "bridge": transformer_bridge,
    "hooked": hooked_transformer,
    "huggingface": huggingface,
}


def choose_reference(name: str) -> tuple[str | None, str]:
    """The reference of that name, or None with the reason; "auto" takes the one installed.

    Raises `ValueError` for a name that is no reference.
    """
    if name == "none":
        return None, "no reference was asked for"
    if name != "auto":
        if name not in REFERENCES:
            raise ValueError(f"no reference {name!r}; choose from auto, none, {[*REFERENCES]}")
        return name, ""
    try:
        return ("bridge" if _major_version() >= 4 else "hooked"), ""
    except PackageNotFoundError:
        pass
    if find_spec("transformers"):
        return "huggingface", ""
    return None, "no reference is installed; install the extra 'bridge'"
