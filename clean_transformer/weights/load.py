"""From a hub id, a folder or a state dict to an architecture and our parameters. Strict."""

import os
from pathlib import Path

import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.weights.hooked_transformer import HOOKED_TRANSFORMER
from clean_transformer.weights.hub import WEIGHTS, complete_set, fetch
from clean_transformer.weights.huggingface import HUGGINGFACE, read_folder, with_prefix
from clean_transformer.weights.openai import OPENAI, read_openai
from clean_transformer.weights.table import State, detect
from clean_transformer.weights.transformer_bridge import TRANSFORMER_BRIDGE

FORMATS = (HOOKED_TRANSFORMER, TRANSFORMER_BRIDGE, HUGGINGFACE, OPENAI)

# How a folder is read, and the format of what is in it, by the file that tells the architecture.
FOLDERS = {
    "config.json": (read_folder, HUGGINGFACE),
    "hparams.json": (read_openai, OPENAI),
}


def read_pretrained(
    source: str | Path, device: torch.device, dtype: torch.dtype
) -> tuple[Config, dict[str, Tensor]]:
    """The architecture and parameters of a hub id, alias or folder, on that device in that dtype.

    Where nothing has to be converted, the parameters are views of the memory-mapped file.
    """
    folder = fetch(source, WEIGHTS)
    names = os.listdir(folder)
    names = complete_set(WEIGHTS, names) or names  # an incomplete set is refused by its reader
    for file, (read, known) in FOLDERS.items():
        if file in names:
            cfg, state = read(folder)
            converted = {key: tensor.to(device, dtype) for key, tensor in state.items()}
            return cfg, known.read(cfg, converted)
    raise FileNotFoundError(f"{folder} has no {' or '.join(FOLDERS)}; is it a model's folder?")


def read_state_dict(state: State, cfg: Config | None = None) -> tuple[Config, dict[str, Tensor]]:
    """The architecture and parameters of a state dict whose format is recognised by its keys.

    Without `cfg` the architecture is read off the shapes (and eps taken as GPT-2's 1e-5).
    """
    state = with_prefix(state)
    known = detect(FORMATS, state)
    cfg = cfg or known.infer_config(state)
    return cfg, known.read(cfg, state)
