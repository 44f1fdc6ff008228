"""Writes the weights that all contestants load."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

from clean_transformer.config import PUBLISHED, Config
from clean_transformer.weights.formats.huggingface import write_folder
from clean_transformer.weights.shapes import parameter_shapes
from clean_transformer.weights.synthetic import stress

# The architecture of a tiny model. fresh.py runs the tiny model before it measures memory, so that
# all libraries are loaded before the measurement.
TINY = Config(n_layers=2, n_heads=2, d_model=64, d_head=32, d_mlp=256)

# This many copies of the weights may be in memory at once: one copy in the operating system's file
# cache, one in a contestant, and one while the weights are converted.
COPIES = 3


def config(name: str) -> Config:
    """Return the architecture for a published size, such as "small", or for "tiny"."""
    return Config.gpt2(name) if name in PUBLISHED else TINY


def count_parameters(cfg: Config) -> int:
    """Return the number of parameters of a model with the architecture `cfg`."""
    return sum(math.prod(shape) for shape in parameter_shapes(cfg).values())


def write_models(names: Iterable[str], folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Write random weights of each model in `names` to the model's own subfolder of `folder`.

    The names are published sizes, such as "small", and "tiny". A model is not written if this
    machine has too little memory for the model. Returns two dictionaries whose keys are model
    names: the subfolders of the written models, and the reasons why the other models were not
    written.
    """
    folders, missing = {}, {}
    for name in names:
        cfg = config(name)
        needed = COPIES * 4 * count_parameters(cfg)
        if needed > memory():
            missing[name] = (
                f"{name} needs {needed / 1e9:.0f} GB of memory, and this machine has "
                f"{memory() / 1e9:.0f} GB"
            )
            continue
        folders[name] = folder / name
        write_folder(folders[name], cfg, stress(cfg))
    return folders, missing


def memory() -> int:
    """Return the size of this machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
