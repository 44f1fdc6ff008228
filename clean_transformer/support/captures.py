"""`Captures`: the outputs of modules in one run, and whether a module overwrote them later."""

import torch
from torch import Tensor, nn


class Captures:
    """The activations of one run of `module`, by name, without gradients.

    They are copies on `device`. If `device` is None, they share memory with the run's activations.
    The method `capture` is meant as the function of a `Reading` hook.
    """

    def __init__(self, module: nn.Module, device: str | torch.device | None):
        self.activations: dict[str, Tensor] = {}
        self.device = device
        # By identity, because the memory on some devices, such as xla, has no address.
        self._weights = {each.untyped_storage() for each in module.parameters()}
        self._writes: dict[str, int | None] = {}

    def capture(self, activation: Tensor, hook: nn.Module) -> None:
        """Store `activation` under the name of the module `hook`."""
        value, name = activation.detach(), str(hook.name)
        if self.device is not None:
            value = value.to(self.device, copy=True)
        elif value.untyped_storage() in self._weights:
            value = value.clone()  # A module of the user can return its weights.
        self.activations[name] = value
        self._writes[name] = writes(value)

    def require_unchanged(self) -> None:
        """Raise `RuntimeError` if a module wrote into an activation after it was stored.

        In inference mode, such a write is not noticed.
        """
        for name, value in self.activations.items():
            if writes(value) != self._writes[name]:
                raise RuntimeError(
                    f"{name} was changed in place after its hook point, so the cache would not "
                    "hold the activation; write `x = x + y` instead of `x += y` in the module "
                    "that does so, or copy the activations with run_with_cache(…, device=…)"
                )


def writes(tensor: Tensor) -> int | None:
    """Return how often PyTorch wrote into the memory of `tensor` so far.

    Returns None for a tensor that was made in inference mode, where PyTorch does not count.
    """
    return None if tensor.is_inference() else tensor._version
