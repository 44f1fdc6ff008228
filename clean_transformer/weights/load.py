"""From a hub id, a folder, a file or a state dict to an architecture and our parameters. Strict."""

import os
from pathlib import Path

import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.weights.formats.gguf import GGUF, read_gguf
from clean_transformer.weights.formats.huggingface import HUGGINGFACE, read_folder, with_prefix
from clean_transformer.weights.formats.nanogpt import (
    NANOGPT,
    NANOGPT_WITHOUT_BIASES,
    read_checkpoint,
)
from clean_transformer.weights.formats.openai import OPENAI, read_openai
from clean_transformer.weights.formats.transformer_lens import (
    HOOKED_TRANSFORMER,
    TRANSFORMER_BRIDGE,
)
from clean_transformer.weights.hub import WEIGHTS, complete_set, fetch
from clean_transformer.weights.table import State, WeightsError, detect

# Hugging Face's has nanoGPT's names, and is what nanoGPT's layouts leave over.
FORMATS = (
    HOOKED_TRANSFORMER,
    TRANSFORMER_BRIDGE,
    OPENAI,
    GGUF,
    NANOGPT,
    NANOGPT_WITHOUT_BIASES,
    HUGGINGFACE,
)


# How a folder is read, and the format of what is in it, by the file that tells the architecture.
FOLDERS = {
    "config.json": (read_folder, HUGGINGFACE),
    "hparams.json": (read_openai, OPENAI),
}


# A single file is read by its suffix; its format shows in the names.
FILES = {".gguf": read_gguf, ".pt": read_checkpoint}


def read_pretrained(
    source: str | Path, device: torch.device, dtype: torch.dtype
) -> tuple[Config, dict[str, Tensor]]:
    """The architecture and parameters of a hub id, alias, folder or file, on that device in that
    dtype.

    Where nothing has to be converted, the parameters are views of the memory-mapped file.
    """
    file = Path(source)
    if file.is_file() or (file.suffix in FILES and not file.is_dir()):
        told, state = _read_file(file)
        return read_state_dict(_converted(state, device, dtype), told)
    folder = fetch(source, WEIGHTS)
    names = os.listdir(folder)
    names = complete_set(WEIGHTS, names) or names  # an incomplete set is refused by its reader
    for name, (read, known) in FOLDERS.items():
        if name in names:
            cfg, state = read(folder)
            return cfg, known.read(cfg, _converted(state, device, dtype))
    raise FileNotFoundError(f"{folder} has no {' or '.join(FOLDERS)}; is it a model's folder?")


def _converted(state: State, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.to(device, dtype) for key, tensor in state.items()}


def _read_file(file: Path) -> tuple[Config | None, State]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    if file.suffix not in FILES:
        raise WeightsError(
            f"{file} is no {' or '.join(FILES)} file; pass the folder that it is a part of"
        )
    return FILES[file.suffix](file)


def read_state_dict(state: State, cfg: Config | None = None) -> tuple[Config, dict[str, Tensor]]:
    """The architecture and parameters of a state dict whose format is recognized by its keys.

    Without `cfg` the architecture is read off the shapes (and eps taken as GPT-2's 1e-5).
    """
    # torch.compile puts this before the names in whatever it compiles.
    state = with_prefix({key.replace("_orig_mod.", ""): state[key] for key in state})
    known = detect(FORMATS, state)
    cfg = cfg or known.infer_config(state)
    return cfg, known.read(cfg, state)
