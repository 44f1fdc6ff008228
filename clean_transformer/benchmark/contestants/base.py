"""The base class of the contestants."""

from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# The dtype in which the weights are loaded, for each dtype that is measured. TF32 is a way to
# multiply float32 tensors, and int8 weights are made from float32 weights.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.float32,
}

Tokens = Int[Tensor, "batch pos"]


class Contestant:
    """A model that is measured. `__init__` loads the weights from `folder`.

    A subclass overrides the method of each kind of work that its model can do, and sets `model` if
    the model can be trained. `package` is the installed package that runs the model, and `imported`
    the module that the users of this package import.
    """

    package = "torch"
    imported = "torch"
    loss: Callable[[Tensor, Tensor], Tensor] = staticmethod(F.cross_entropy)
    model: Any

    def __init__(self, folder: Path, device: str, dtype: str):
        self.folder, self.device, self.dtype = folder, device, dtype

    @property
    def title(self) -> str:
        """The name and version of the package."""
        return f"{self.package} {version(self.package)}"

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """Logits for all positions; with `last_only`, only for the last position."""
        raise NotImplementedError(f"{type(self).__name__} computes no logits")

    def generate(self, tokens: Tokens, new: int) -> Any:
        """`new` tokens [batch new] after each input, chosen greedily, without stopping early."""
        raise NotImplementedError(f"{type(self).__name__} generates no tokens")

    def capture(self, tokens: Tokens) -> Any:
        """The logits and all activations of a forward pass."""
        raise NotImplementedError(f"{type(self).__name__} keeps no activations")

    def last_logits(self, tokens: Tokens) -> Float[Tensor, "batch d_vocab"]:
        """The last logits for each input, in float32 on the CPU, to compare them with ours."""
        return self.forward(tokens)[:, -1].float().cpu()

    def train_step(self, tokens: Tokens) -> float:
        """Train for one step of AdamW, and return the loss before that step."""
        optimizer = self.optimizer
        logits = self.forward(tokens[:, :-1])
        loss = self.loss(logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """A fused AdamW for the model's parameters. Also puts the model in training mode."""
        for name, parameter in self.model.train().named_parameters():
            # No other contestant has this bias, and our `train` does not train it.
            parameter.requires_grad_(name != "unembed.b_U")
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def any_shape(device: str) -> bool | None:
    """The value of the argument `dynamic` of `torch.compile`: True on a CPU, None elsewhere.

    On a CPU, one graph for all shapes compiles in half a minute, and is as fast as other graphs.
    """
    return True if device == "cpu" else None
