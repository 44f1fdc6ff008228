"""`HookPoint`, where a hook reads or replaces an activation, and `HookedModule`.

`HookedModule` is the base class of all modules that have hook points.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from clean_transformer.activation_cache import ActivationCache


class HookPoint(nn.Module):
    """An identity module. A hook on this module receives the activation and can replace it.

    A hook function gets the hook point as its argument `hook`, and can read `hook.name`, as in
    TransformerLens. `run_with_hooks` sets this `name` to the path of the hook point in the model.
    """

    name: str | None = None

    def forward(self, activation: Tensor) -> Tensor:
        """Return `activation` itself, not a copy."""
        return activation


def hook_points(module: nn.Module) -> dict[str, HookPoint]:
    """Return a dictionary from the path of each hook point inside `module` to the hook point."""
    return {name: part for name, part in module.named_modules() if isinstance(part, HookPoint)}


def observed(*points: nn.Module) -> bool:
    """Return whether at least one of the hook points `points` has a forward or backward hook.

    Modules such as `Attention` compute step by step if the result is True, because each activation
    must then pass through its hook point. If the result is False, they use a fused kernel.
    """
    return any(
        point._forward_hooks
        or point._forward_pre_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
        for point in points
    )


# A selection of activations: one name, several names, or a function that takes the name of a hook
# point and returns whether the activation is selected.
Names = str | Iterable[str] | Callable[[str], bool]
HookFunction = Callable[..., Tensor | None]

# `PER_HEAD_INPUTS` are the block's hook points for the inputs of each attention head. `PER_HEAD`
# also contains attention's hook point for the output of each head. Each of these activations is
# [batch pos head d_model], and needs n_heads times the memory of a residual stream. Therefore
# `run_with_cache` captures these activations only if its argument `names` selects them.
PER_HEAD_INPUTS = ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
PER_HEAD = (*PER_HEAD_INPUTS, "hook_result")


class HookedModule(nn.Module):
    """The base class of all modules with hook points, from a whole model to one LayerNorm.

    `run_with_cache` returns the activations at the hook points, and `run_with_hooks` changes
    activations. In both methods, the path of a submodule, such as "blocks.0.ln1", selects the
    output of this submodule. `run_with_hooks` sets `name` of the submodule to this path.
    """

    name: str | None = None

    def hook_points(self) -> dict[str, HookPoint]:
        """Return a dictionary from the path of each hook point in this module to the hook point."""
        return hook_points(self)

    def default_points(self) -> dict[str, HookPoint]:
        """Return the hook points that `run_with_cache` captures by default.

        These are all hook points except the hook points in `PER_HEAD`.
        """
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
        """Return the output of `self(*inputs, **arguments)`, and an `ActivationCache` of the run.

        The cached activations are detached from the autograd graph. `names` selects them: one name,
        several names, or a function that takes the name of a hook point and returns whether to
        capture its activation. By default, the cache holds the activations of `default_points`. The
        path of a submodule, such as "blocks.0.ln1", selects the submodule's output. If
        `remove_batch_dim` is True, the cached activations have no batch axis; the batch must hold
        one input. Raises `KeyError` for an unknown name, before the module runs.
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
        """Run `self(*inputs, **arguments)` with temporary hook functions, and return the output.

        `hooks` is a list of pairs (names, function). In each pair, `names` selects activations as
        in `run_with_cache`. The forward pass calls `function(activation, hook=hook_point)` for each
        selected activation; `hook_point.name` is the activation's name. The function returns the
        replacement of the activation, or `None` to leave the activation as it is. Raises `KeyError`
        for an unknown name, before the module runs.
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
