"""The modes in which the suite runs a model, such as "eager" and "compiled".

This file does not import PyTorch, because `--help` lists the modes and must be fast.
"""

from clean_transformer.support.dtypes import choose_names

# eager: the model runs as it is written.
# compiled: `torch.compile` compiles each module by itself.
# autocast: a float32 model runs under autocast to bfloat16.
# optimized: the model runs after `model.optimize()`.
# optimized-compiled: `model.optimize()` runs first, then `torch.compile` compiles each module.
MODES = ("eager", "compiled", "autocast", "optimized", "optimized-compiled")


def choose_modes(names: str) -> list[str]:
    """Return the modes in the comma-separated list `names`; "all" stands for every mode.

    Raises `ValueError` for an unknown mode.
    """
    return choose_names("mode", names, MODES)
