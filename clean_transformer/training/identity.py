"""What identifies a training run: its settings, tokens and modules, and its first weights."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.hooks import HookPoint
from clean_transformer.model import DemoTransformer
from clean_transformer.training.settings import Training
from clean_transformer.training.windows import Tokens, fingerprint

# The attributes of a module that may differ between two calls that belong to the same run.
STATE = ("training", "name")


class WeightsReplaced(UserWarning):
    """Warns that a model, whose weights are not from the run, gets the weights of the run."""


def describe(
    model: DemoTransformer, training: Training, tokens: Tokens, held_out: Tokens | None
) -> dict[str, Any]:
    """Return the values that identify a run. A run can be resumed only with the same values.

    The values are the fields of `model.cfg` and of `training`, the number of tokens, hashes of the
    tokens and of the held-out tokens, and the class and the settings of each module.
    """
    modules = {
        path: in_words(module)
        for path, module in model.named_modules()
        if not isinstance(module, HookPoint)
    }
    data = {
        "n_tokens": len(tokens),
        "hash of the tokens": fingerprint(tokens),
        "hash of the held-out tokens": None if held_out is None else fingerprint(held_out),
    }
    return model.cfg.to_dict() | asdict(training) | data | modules


def in_words(module: nn.Module) -> str:
    """Return the module's class and its settings, such as "SlidingWindowAttention(window=8)".

    The settings are the public attributes that are numbers, texts, True or False.
    """
    settings = [
        f"{name}={value!r}"
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str)) and name[0] != "_" and name not in STATE
    ]
    return type(module).__name__ + (f"({', '.join(settings)})" if settings else "")


def first_weights(
    saved: Mapping[str, Any] | None, state: Mapping[str, Tensor], folder: Path, steps: int
) -> str:
    """Return the `hash_of_weights` of the weights with which the run in `folder` began.

    If `saved` is None, the run begins now, with the weights `state`. Otherwise `saved` is the run's
    checkpoint. The warning `WeightsReplaced` says that the weights `state` will be replaced, if
    they are neither the run's first weights nor those of the checkpoint. `steps` is the number of
    steps of the whole run.
    """
    now = hash_of_weights(state)
    if saved is None:
        return now
    if now not in (saved["start"], hash_of_weights(saved["model"])):
        finished = "; the run is finished, so nothing is trained" if saved["step"] == steps else ""
        warnings.warn(
            f"the run in {folder} began with other weights than this model has. The model gets the "
            f"weights of the checkpoint, after {saved['step']} of {steps} steps{finished}",
            WeightsReplaced,
            stacklevel=3,
        )
    return saved["start"]


def hash_of_weights(state: Mapping[str, Tensor]) -> str:
    """Return a hash of the names, dtypes and values of the weights in a state dict."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        hashed.update(f"{name} {value.dtype} {[*value.shape]}".encode())
        hashed.update(value.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
