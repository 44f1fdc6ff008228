"""Loads the model that a user names in the command `clean-transformer check`, and its inputs."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.any_model.check import Inputs
from clean_transformer.parity.inputs import LENGTH, choose_weights, suite_tokens
from clean_transformer.parity.references.choose import IMPLEMENTATIONS, choose_reference
from clean_transformer.weights.table import State

# The value of the argument `implementation` that stands for `DemoTransformer`.
OURS = "ours"
# Names under which configurations of models keep the vocabulary's size and the longest sequence.
VOCABULARY = ("d_vocab", "vocab_size")
CONTEXT = ("n_ctx", "n_positions", "block_size", "max_position_embeddings")


@dataclass(frozen=True)
class Target:
    """A model and its inputs, on the chosen device. `title` says where the model comes from."""

    model: nn.Module
    inputs: Inputs
    title: str


def load_target(
    name: str, implementation: str, device: torch.device, dtype: torch.dtype | None
) -> Target:
    """Load the model called `name`, and make its inputs.

    If `name` is "file.py:function", the file is run, and the function returns the model. If the
    file also has a function `make_inputs`, this function returns the inputs. Otherwise the inputs
    are random token ids [2 33]; they are shorter than 33 if the model's longest sequence is
    shorter.

    Any other `name` stands for the weights of a GPT-2 (see `choose_weights`). `implementation` says
    which class runs them: "ours" for `DemoTransformer`, or the name of another implementation, such
    as "huggingface". "auto" chooses another implementation if one is installed, and "ours"
    otherwise. `dtype` is the dtype of the model. If `dtype` is None, a model from a file keeps its
    dtypes, and any other model is in float32.

    Raises `ValueError` for an unknown implementation, if there is no such file or function, if the
    function raises an exception or returns no model, or if the vocabulary's size is not known.
    """
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        if implementation != "auto":
            raise ValueError(f"{name} makes its own model; do not give --as {implementation}")
        return _from_file(Path(file), function, device, dtype)
    if name.endswith(".py"):
        raise ValueError(f"name the function that makes the model: {name}:FUNCTION")
    builders = {each.name: each.model for each in IMPLEMENTATIONS} | {OURS: _ours}
    if implementation == "auto":
        implementation = choose_reference("auto")[0] or OURS
    if implementation not in builders:
        raise ValueError(f"no --as {implementation!r}; choose from auto, {', '.join(builders)}")
    weights = choose_weights(name)
    state = {key: value.to(dtype or torch.float32) for key, value in weights.state.items()}
    model = builders[implementation](weights.cfg, state, device)
    return Target(model, suite_tokens(weights.cfg).to(device), weights.title)


def _ours(cfg: Config, state: State, device: torch.device) -> DemoTransformer:
    return DemoTransformer.from_state_dict(state, cfg).to(device)


def _from_file(
    file: Path, function: str, device: torch.device, dtype: torch.dtype | None
) -> Target:
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    spec = spec_from_file_location("__checked__", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    # The file may import its neighbors. Dataclasses look up their module in `sys.modules`.
    sys.path.insert(0, str(file.parent.resolve()))
    sys.modules["__checked__"] = module
    _call(str(file), partial(spec.loader.exec_module, module))
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{file} has no function {function!r}")
    model = _call(f"{file}:{function}", getattr(module, function))
    if not isinstance(model, nn.Module):
        raise ValueError(f"{file}:{function} returns {type(model).__name__}, not an nn.Module")
    model.to(device, dtype)
    make_inputs = getattr(module, "make_inputs", None)
    inputs = _call(f"{file}:make_inputs", make_inputs) if make_inputs else _chosen_tokens(model)

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else None)

    return Target(model, tree_map(move, inputs), f"{file}:{function}")


def _call(what: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        raise ValueError(f"{what} raised {type(error).__name__}: {error}") from error


def _chosen_tokens(model: nn.Module) -> Tensor:
    """Return random token ids [2 33], or shorter ones, that fit the model's configuration."""
    cfg = getattr(model, "config", getattr(model, "cfg", None))
    found = (getattr(cfg, name, None) for name in VOCABULARY)
    d_vocab = next((size for size in found if size), None)
    if d_vocab is None:
        raise ValueError(
            "the model has no config.vocab_size, so no token ids can be chosen for it; define a "
            "function make_inputs in the same file, which returns the model's inputs"
        )
    lengths = (getattr(cfg, name, None) for name in CONTEXT)
    length = min([LENGTH, *filter(None, lengths)])
    return torch.randint(d_vocab, (2, length), generator=torch.Generator().manual_seed(0))
