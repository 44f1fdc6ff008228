"""The modes in which the suite runs a model, such as "eager" and "compiled".

This file does not import PyTorch, because `--help` lists the modes and must be fast.
"""

from dataclasses import dataclass

from clean_transformer.support.dtypes import choose_names
from clean_transformer.support.validation import refuse_other

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


def require_mode(name: str) -> None:
    """Raise `ValueError` if `name` is not the name of one mode."""
    refuse_other("mode", name, *MODES)


@dataclass(frozen=True)
class Compilation:
    """The arguments that `torch.compile` gets in the mode "compiled".

    `backend` is the name of a compile backend, such as "inductor" or "aot_eager". `dynamic` asks
    for graphs that fit several input shapes. `mode` is a mode of inductor, such as
    "max-autotune".
    """

    backend: str = "inductor"
    dynamic: bool = False
    mode: str | None = None


# What `torch.compile` does without arguments, but with one graph for each input shape.
INDUCTOR = Compilation()
