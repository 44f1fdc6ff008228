"""Hook points, where an activation is observed or replaced, and modules that have them."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from clean_transformer.activation_cache import ActivationCache


class HookPoint(nn.Module):
    """An identity in the forward pass. A hook on it sees the activation and can replace it.

    `run_with_hooks` sets `name` to the path of the hook point in the model. Hook functions read it
    as `hook.name`, as in TransformerLens.
    """

    name: str | None = None

    def forward(self, activation: Tensor) -> Tensor:
        """The very same tensor."""
        return activation


def hook_points(module: nn.Module) -> dict[str, HookPoint]:
    """Every hook point inside a module, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, HookPoint)}


def observed(*points: nn.Module) -> bool:
    """Whether any of the hook points has a forward or backward hook, whoever registered it.

    If so, a module computes step by step through its hook points. If not, it uses a fused kernel.
    """
    return any(
        point._forward_hooks
        or point._forward_pre_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
        for point in points
    )


# The names of hook points: one, several, or a function that says which.
Names = str | Iterable[str] | Callable[[str], bool]
HookFunction = Callable[..., Tensor | None]

# The block's hook points for the input of each attention head, and with them attention's hook point
# for the output of each head. They hold one residual stream per head, n_heads times the memory of
# the others, so `run_with_cache` captures them only by name.
PER_HEAD_INPUTS = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
PER_HEAD = (*PER_HEAD_INPUTS, "hook_result")


class HookedModule(nn.Module):
    """A module with hook points, which can be observed and patched, also when it runs alone.

    `name` is that of `HookPoint`, for hooks on the output of a whole module.
    """

    name: str | None = None

    def hook_points(self) -> dict[str, HookPoint]:
        """Every hook point inside this module, by name."""
        return hook_points(self)

    def default_points(self) -> dict[str, HookPoint]:
        """The hook points that `run_with_cache` captures by default: all but those per head."""
        return {
            name: point
            for name, point in self.hook_points().items()
            if name.split(".")[-1] not in PER_HEAD
        }

    def run_with_cache(
        self,
        *inputs: Any,
        names: Names | None = None,
        remove_batch_dim: bool = False,
        **arguments: Any,
    ) -> tuple[Any, ActivationCache]:
        """The output of `self(*inputs, **arguments)`, and a cache of the activations, detached.

        `names` selects what to capture: one name, several names, or a function from a name to True
        or False. By default these are `default_points`. The name of a submodule ("blocks.0.ln1")
        captures its output. `remove_batch_dim` removes the batch axis of a single input. Raises
        `KeyError` for an unknown name before it runs.
        """
        captured: dict[str, Tensor] = {}

        def capture(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            captured[name] = output.detach()

        wanted = self._named(names) if names is not None else self.default_points()
        with _forward_hooks((module, partial(capture, name)) for name, module in wanted.items()):
            output = self(*inputs, **arguments)
        layers = {name.split(".")[1] for name in self.hook_points() if name.startswith("blocks.")}
        cache = ActivationCache(captured, len(layers))
        return output, cache.remove_batch_dim() if remove_batch_dim else cache

    def run_with_hooks(
        self, *inputs: Any, hooks: Iterable[tuple[Names, HookFunction]], **arguments: Any
    ) -> Any:
        """The output of `self(*inputs, **arguments)` while functions run at hook points.

        `hooks` are pairs of names, as in `run_with_cache`, and a function. The function gets
        `(activation, hook)`, where `hook.name` is the name of the hook point. It returns another
        activation, or `None` to keep this one. Raises `KeyError` for an unknown name before it
        runs.
        """

        def call(function: HookFunction, point: nn.Module, args: Any, output: Tensor) -> Any:
            return function(output, hook=point)

        placed = []
        for names, function in hooks:
            for name, point in self._named(names).items():
                point.name = name  # type: ignore[assignment, unused-ignore]
                placed.append((point, partial(call, function)))
        with _forward_hooks(placed):
            return self(*inputs, **arguments)

    def _named(self, names: Names) -> Mapping[str, nn.Module]:
        if callable(names):
            return {name: point for name, point in self.hook_points().items() if names(name)}
        modules = dict(self.named_modules())
        wanted = [names] if isinstance(names, str) else [*names]
        for name in wanted:
            if name not in modules:
                near = difflib.get_close_matches(name, modules, n=3)
                raise KeyError(f"{type(self).__name__} has no {name!r}; did you mean {near}?")
        return {name: modules[name] for name in wanted}


@contextmanager
def _forward_hooks(
    placed: Iterable[tuple[nn.Module, Callable[..., Any]]],
) -> Iterator[None]:
    handles = []
    try:
        for module, function in placed:
            handles.append(module.register_forward_hook(function))
        yield
    finally:
        for handle in handles:
            handle.remove()
