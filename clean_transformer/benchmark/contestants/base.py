"""What all contestants have in common."""

from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# The dtype in which the weights are loaded. TF32 is a way to multiply float32, and int8 weights
# are made from float32.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.float32,
}

Tokens = Int[Tensor, "batch pos"]


class Contestant:
    """A model that is measured. Making one loads the weights from `folder`.

    A subclass overrides the work that it can do, and sets `model` if it can be trained. `package`
    is the installed package that runs it, and `imported` the module that its users import.
    """

    package = "torch"
    imported = "torch"
    loss: Callable[[Tensor, Tensor], Tensor] = staticmethod(F.cross_entropy)
    model: Any

    def __init__(self, folder: Path, device: str, dtype: str):
        self.folder, self.device, self.dtype = folder, device, dtype

    @property
    def title(self) -> str:
        """The package and its version."""
        return f"{self.package} {version(self.package)}"

    def forward(self, tokens: Tokens, last_only: bool = False) -> Any:
        """The logits of all positions, or with `last_only` of the last."""
        raise NotImplementedError(f"{type(self).__name__} computes no logits")

    def generate(self, tokens: Tokens, new: int) -> Any:
        """`new` tokens after each input, greedily and without stopping [batch new]."""
        raise NotImplementedError(f"{type(self).__name__} generates no tokens")

    def capture(self, tokens: Tokens) -> Any:
        """The logits and every activation of a forward pass."""
        raise NotImplementedError(f"{type(self).__name__} keeps no activations")

    def last_logits(self, tokens: Tokens) -> Float[Tensor, "batch d_vocab"]:
        """The logits after each input, in float32 on the CPU, to compare with other models'."""
        return self.forward(tokens)[:, -1].float().cpu()

    def train_step(self, tokens: Tokens) -> float:
        """The loss of the next tokens, before one step of AdamW."""
        optimizer = self.optimizer
        logits = self.forward(tokens[:, :-1])
        loss = self.loss(logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """A fused AdamW for the model, which is put in training mode."""
        for name, parameter in self.model.train().named_parameters():
            # No other contestant has this bias, and our `train` does not train it.
            parameter.requires_grad_(name != "unembed.b_U")
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def any_shape(device: str) -> bool | None:
    """The argument `dynamic` of `torch.compile`.

    On a CPU one graph for all shapes takes half a minute to compile, and is as fast.
    """
    return True if device == "cpu" else None
