"""The modes in which the suite runs a model.

This file does not import PyTorch, because `--help` lists the modes and must be fast.
"""

from clean_transformer.support.dtypes import choose_names

# eager: as written. compiled: `torch.compile` on each module. autocast: a float32 model under
# autocast to bfloat16. optimized: after `optimize()`. optimized-compiled: `torch.compile` on each
# module after `optimize()`.
MODES = ("eager", "compiled", "autocast", "optimized", "optimized-compiled")


def choose_modes(names: str) -> list[str]:
    """The modes named in a comma-separated list; "all" names every mode.

    Raises `ValueError` for an unknown mode.
    """
    return choose_names("mode", names, MODES)
