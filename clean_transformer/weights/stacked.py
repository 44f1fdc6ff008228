"""`StackedWeights`: a model's weights by TransformerLens's names, stacked over the layers."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def _weight(model: nn.Module, path: str, name: str) -> Any:
    """Return the weight `name` of the module at `path`. Raises `ValueError` if it has none."""
    module = model.get_submodule(path)
    if not hasattr(module, name):  # an AttributeError would seem to be about the model itself
        raise ValueError(f"{path} is a {type(module).__name__}, which has no {name}")
    return getattr(module, name)


def _one(path: str, name: str, axes: str) -> Any:
    """Return a property: the weight `name` of the module at `path`."""
    doc = f"`{path}.{name}` [{axes}]."
    return property(lambda model: _weight(model, path, name), doc=doc)


def _stacked(part: str, name: str, axes: str) -> Any:
    """Return a property: the weights `name` of the module `part` of every block, stacked."""

    def read(model: nn.Module) -> Tensor:
        paths = (f"blocks.{layer}.{part}" for layer in range(len(model.blocks)))  # type: ignore[arg-type]
        return torch.stack([_weight(model, path, name) for path in paths])

    return property(read, doc=f"`{part}.{name}` of every block, as one tensor [layer {axes}].")


class StackedWeights(nn.Module):
    """Adds the attributes `W_E`, `W_Q`, … to a model, by TransformerLens's names.

    W_Q to b_out are new tensors, stacked over the layers. Changing them in place does not change
    the model. If a swapped module lacks a weight, reading the attribute raises `ValueError`.
    """

    W_E = _one("embed", "W_E", "d_vocab d_model")
    W_pos = _one("pos_embed", "W_pos", "n_ctx d_model")
    W_U = _one("unembed", "W_U", "d_model d_vocab")
    b_U = _one("unembed", "b_U", "d_vocab")

    W_Q = _stacked("attn", "W_Q", "head d_model d_head")
    W_K = _stacked("attn", "W_K", "head d_model d_head")
    W_V = _stacked("attn", "W_V", "head d_model d_head")
    W_O = _stacked("attn", "W_O", "head d_head d_model")
    b_Q = _stacked("attn", "b_Q", "head d_head")
    b_K = _stacked("attn", "b_K", "head d_head")
    b_V = _stacked("attn", "b_V", "head d_head")
    b_O = _stacked("attn", "b_O", "d_model")
    W_in = _stacked("mlp", "W_in", "d_model d_mlp")
    W_out = _stacked("mlp", "W_out", "d_mlp d_model")
    b_in = _stacked("mlp", "b_in", "d_mlp")
    b_out = _stacked("mlp", "b_out", "d_model")

    @property
    def W_E_pos(self) -> Float[Tensor, "embedding d_model"]:
        """The rows of W_E, followed by the rows of W_pos: d_vocab + n_ctx embeddings."""
        return torch.cat([self.W_E, self.W_pos])
