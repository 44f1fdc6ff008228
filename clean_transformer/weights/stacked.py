"""`StackedWeights`: the attributes `W_E`, `W_Q`, … of a model, as in TransformerLens.

`HeadCircuits`: the attributes `QK` and `OV` of a model and of its attention modules.
"""

from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clean_transformer.support.left_out import NoValue


def _weight(model: nn.Module, path: str, name: str) -> Any:
    """Return the weight `name` of the module at `path` in the model.

    Raises `NoValue` if the module has no such weight.
    """
    module = model.get_submodule(path)
    if not hasattr(module, name):
        raise NoValue(f"{path} is a {type(module).__name__}, which has no {name}")
    return getattr(module, name)


def _one(path: str, name: str, axes: str) -> Any:
    """Return a property whose value is the weight `name` of the module at `path`."""
    doc = f"`{path}.{name}` [{axes}]."
    return property(lambda model: _weight(model, path, name), doc=doc)


def _stacked(part: str, name: str, axes: str) -> Any:
    """Return a property whose value stacks the weights `name` of `part` in every block.

    `part` is the name of a block's submodule, such as "attn".
    """

    def read(model: nn.Module) -> Tensor:
        paths = (f"blocks.{layer}.{part}" for layer in range(len(model.blocks)))  # type: ignore[arg-type]
        return torch.stack([_weight(model, path, name) for path in paths])

    return property(read, doc=f"`{part}.{name}` of every block, as one tensor [layer {axes}].")


def _factored(left: Tensor, right: Tensor) -> Any:
    """Return the product `left @ right` as a `FactoredMatrix` of TransformerLens.

    Raises `ImportError` if TransformerLens is not installed.
    """
    try:
        from transformer_lens import FactoredMatrix
    except ModuleNotFoundError as error:
        if error.name != "transformer_lens":  # one of its dependencies is not installed
            raise
        raise ImportError(
            "QK and OV are a FactoredMatrix of transformer_lens, which is not installed: "
            "pip install 'clean-transformer[bridge]'"
        ) from None
    return FactoredMatrix(left, right)


class HeadCircuits(nn.Module):
    """A base class that adds `QK` and `OV` to a module that has W_Q, W_K, W_V and W_O.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". Both are a
    `FactoredMatrix` of TransformerLens: a product of two matrices, which is not multiplied out.
    Reading `QK` or `OV` raises `ImportError` if TransformerLens is not installed.
    """

    QK = property(
        lambda module: _factored(module.W_Q, module.W_K.transpose(-2, -1)),
        doc="W_Q W_Kᵀ of each head, as a `FactoredMatrix` [... head d_model d_model].",
    )
    OV = property(
        lambda module: _factored(module.W_V, module.W_O),
        doc="W_V W_O of each head, as a `FactoredMatrix` [... head d_model d_model].",
    )

    def __dir__(self) -> list[str]:
        # Tools such as `torch.jit.trace` read every attribute that is listed here.
        names = super().__dir__()  # type: ignore[no-untyped-call]
        is_there = find_spec("transformer_lens") is not None
        return [name for name in names if is_there or name not in ("QK", "OV")]


class StackedWeights(HeadCircuits):
    """A base class that adds the attributes `W_E`, `W_Q`, … to a model, as in TransformerLens.

    Reading a weight of attention or MLP, such as `W_Q`, makes a new tensor, which stacks the
    weights of all layers. Changing this tensor does not change the model. If a module lacks a
    weight, for example because the module was swapped, reading the attribute raises `NoValue`,
    which is both a `ValueError` and an `AttributeError`.
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
        """W_E and W_pos, concatenated along their first axis: [d_vocab + n_ctx, d_model]."""
        return torch.cat([self.W_E, self.W_pos])
