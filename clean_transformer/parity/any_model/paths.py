"""Finds the submodule of a model that makes an ATen call, in the forward and the backward pass."""

from bisect import bisect_right
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

# The path of calls that the model's own `forward` makes outside of its submodules.
MODEL = "(model)"
# The path of calls outside of the model's `forward`, such as the loss or the choice of a token.
OUTSIDE = "(outside)"
# TransformerBridge keeps each module that it wraps under this name. Paths leave the name out.
WRAPPED = "._original_component"


class ModulePaths(AbstractContextManager["ModulePaths"]):
    """Inside a `with` block, `current` is the path of the submodule that is running.

    A path is the submodule's name in `model.named_modules()`, such as "h.0.attn". It is MODEL for
    calls that the model's own `forward` makes outside of its submodules. It is OUTSIDE for calls
    outside of the model's `forward`, such as the loss.
    """

    def __init__(self, model: nn.Module):
        named = model.named_modules()
        self.names = {module: name.replace(WRAPPED, "") or MODEL for name, module in named}
        self.stack = [OUTSIDE]
        self.starts: list[int] = []
        self.paths: list[str] = []
        self.hooks = ExitStack()

    def __enter__(self) -> "ModulePaths":
        # These hooks are global: hooks on the modules would change how a `DemoTransformer` computes
        # its attention.
        before = register_module_forward_pre_hook(self._started)
        after = register_module_forward_hook(self._ended, always_call=True)
        self.hooks.callback(before.remove)
        self.hooks.callback(after.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.close()

    @property
    def current(self) -> str:
        """The path of the submodule that makes the current call.

        In the backward pass, this is the submodule whose forward pass created the current autograd
        node.
        """
        node = torch._C._current_autograd_node()
        # With gradient checkpointing, a submodule runs forward during the backward pass.
        if node is None or len(self.stack) > 1:
            return self.stack[-1]
        # Autograd numbers the nodes of its graph during the forward pass. The nodes from number
        # `starts[i]` up to the next start belong to `paths[i]`.
        place = bisect_right(self.starts, node._sequence_nr()) - 1
        return self.paths[place] if place >= 0 else OUTSIDE

    def _started(self, module: nn.Module, args: Any) -> None:
        if module in self.names:
            self.stack.append(self.names[module])
            self._note()

    def _ended(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self.names:
            self.stack.pop()
            self._note()

    def _note(self) -> None:
        number = torch._C._autograd._get_sequence_nr()
        if self.starts and self.starts[-1] == number:  # no node was created since the last change
            self.paths[-1] = self.stack[-1]
        else:
            self.starts.append(number)
            self.paths.append(self.stack[-1])
