"""Defines `Contestant`, the base class of the models whose speed is compared."""

from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# The keys are the dtypes in which contestants are measured, and the values are the dtypes in which
# their weights are loaded. With TF32, a GPU multiplies float32 tensors faster and less precisely,
# so for "tf32", the weights are loaded in float32. For "int8", the weights are loaded in float32,
# and then rounded.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.float32,
}

Tokens = Int[Tensor, "batch pos"]


class Contestant:
    """The base class of the models that are measured. `__init__` loads the weights from `folder`.

    A subclass overrides those of the methods `forward`, `generate` and `capture` that its model
    supports. If `train_step` can train this model, the attribute `model` holds it. `package` is the
    name of the installed package that runs the model. `imported` is the name of the module whose
    import is timed. `loss` takes logits [n d_vocab] and token ids [n], and returns the mean loss.
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
        """Compute the logits for all positions; with `last_only`, only for the last position."""
        raise NotImplementedError(f"{type(self).__name__} computes no logits")

    def generate(self, tokens: Tokens, new: int) -> Any:
        """Generate exactly `new` tokens after each input, and return the new tokens [batch new].

        Each new token is the most likely next token. <|endoftext|> does not stop the generation.
        """
        raise NotImplementedError(f"{type(self).__name__} generates no tokens")

    def capture(self, tokens: Tokens) -> Any:
        """Run a forward pass, and return the logits and all activations."""
        raise NotImplementedError(f"{type(self).__name__} keeps no activations")

    def last_logits(self, tokens: Tokens) -> Float[Tensor, "batch d_vocab"]:
        """Return the logits at the last position of each input, in float32 on the CPU."""
        return self.forward(tokens)[:, -1].float().cpu()

    def train_step(self, tokens: Tokens) -> float:
        """Make one training step with AdamW, and return the loss before this step."""
        optimizer = self.optimizer
        logits = self.forward(tokens[:, :-1])
        loss = self.loss(logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer for the model's parameters: AdamW, in PyTorch's fused implementation.

        The first access to `optimizer` puts `model` in training mode.
        """
        for name, parameter in self.model.train().named_parameters():
            # Only our model has this bias, and the command `train` does not train it.
            parameter.requires_grad_(name != "unembed.b_U")
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-5, fused=True)


def any_shape(device: str) -> bool | None:
    """Return the argument `dynamic` for `torch.compile`: True on a CPU, None on other devices."""
    # With True, `torch.compile` makes one graph for all shapes. On a CPU, this graph compiles in
    # half a minute, and is as fast as a graph for a single shape.
    return True if device == "cpu" else None
