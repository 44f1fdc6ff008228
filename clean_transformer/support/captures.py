"""`Captures`: the outputs of modules in one run, and whether they are still as they were."""

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
        self._weights = {each.untyped_storage().data_ptr() for each in module.parameters()}
        self._versions: dict[str, int] = {}

    def capture(self, activation: Tensor, hook: nn.Module) -> None:
        """Store `activation` under the name of the module `hook`."""
        value, name = activation.detach(), str(hook.name)
        if self.device is not None:
            value = value.to(self.device, copy=True)
        elif value.untyped_storage().data_ptr() in self._weights:
            value = value.clone()  # A module of the user can return its weights.
        self.activations[name] = value
        # PyTorch counts the writes to a tensor in `_version`, except in inference mode.
        if not value.is_inference():
            self._versions[name] = value._version

    def require_unchanged(self) -> None:
        """Raise `RuntimeError` if a module wrote into an activation after it was stored."""
        for name, version in self._versions.items():
            if self.activations[name]._version != version:
                raise RuntimeError(
                    f"{name} was changed in place after its hook point, so the cache would not "
                    "hold the activation; write `x = x + y` instead of `x += y` in the module "
                    "that does so, or copy the activations with run_with_cache(…, device=…)"
                )
