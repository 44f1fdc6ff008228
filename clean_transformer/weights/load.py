"""From a hub id, a folder or a state dict to an architecture and our parameters. Strict."""

from pathlib import Path

import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.weights.hooked_transformer import HOOKED_TRANSFORMER
from clean_transformer.weights.hub import WEIGHTS, fetch
from clean_transformer.weights.huggingface import HUGGINGFACE, read_folder, with_prefix
from clean_transformer.weights.table import State, detect
from clean_transformer.weights.transformer_bridge import TRANSFORMER_BRIDGE

FORMATS = (HOOKED_TRANSFORMER, TRANSFORMER_BRIDGE, HUGGINGFACE)


def read_pretrained(
    source: str | Path, device: torch.device, dtype: torch.dtype
) -> tuple[Config, dict[str, Tensor]]:
    """The architecture and parameters of a hub id, alias or folder, on that device in that dtype.

    Where nothing has to be converted, the parameters are views of the memory-mapped file.
    """
    cfg, state = read_folder(fetch(source, WEIGHTS))
    converted = {key: tensor.to(device, dtype) for key, tensor in state.items()}
    return cfg, HUGGINGFACE.read(cfg, converted)


def read_state_dict(state: State, cfg: Config | None = None) -> tuple[Config, dict[str, Tensor]]:
    """The architecture and parameters of a state dict whose format is recognised by its keys.

    Without `cfg` the architecture is read off the shapes (and eps taken as GPT-2's 1e-5).
    """
    state = with_prefix(state)
    known = detect(FORMATS, state)
    cfg = cfg or known.infer_config(state)
    return cfg, known.read(cfg, state)
