"""The ways to run a model. Importing this file imports no PyTorch: the help lists the names."""

from clean_transformer.support.dtypes import choose_names

# As written, each module compiled by `torch.compile`, float32 under autocast to bfloat16, after
# `optimize()`, and with optimized modules compiled.
MODES = ("eager", "compiled", "autocast", "optimized", "optimized-compiled")


def choose_modes(names: str) -> list[str]:
    """The modes in a comma-separated list, or all. Raises `ValueError` for an unknown mode."""
    return choose_names("mode", names, MODES)
