"""`HookPoint`, where a hook reads or replaces an activation, and `HookedModule`.

`HookedModule` is the base class of all modules that have hook points.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.activation_cache import ActivationCache
from clean_transformer.support.captures import Captures
from clean_transformer.support.keywords import checks_keywords, keywords, refuse_unknown
from clean_transformer.support.knows_left_out import KnowsLeftOut
from clean_transformer.support.left_out import refuse
from clean_transformer.support.module_hooks import (
    Direction,
    Editing,
    EditingGradient,
    Placed,
    Placement,
    Reading,
    add,
    compiled,
    edited_modules,
    remove,
    require_runs,
)
from clean_transformer.support.selection import (
    PER_HEAD,
    Hooks,
    Names,
    pairs,
    require_hookable,
    select,
)

HookFunction = Callable[..., Tensor | None]


class HookPoint(KnowsLeftOut):
    """A module that returns its input. A hook on this module can read and replace an activation.

    `is_shared` says that the model also uses the activation elsewhere. A plain PyTorch hook, which
    may write into it, then gets a copy.

    A hook function gets the hook point as its argument `hook`. The attribute `hook.name` is the
    path of the hook point in the model, such as "blocks.0.attn.hook_z".
    """

    name: str | None = None

    def __init__(self, *, is_shared: bool = False):
        super().__init__()
        self.is_shared = is_shared

    def forward(self, activation: Tensor) -> Tensor:
        """Return `activation` itself, not a copy, unless it is shared and has plain hooks."""
        hooks = self._forward_hooks
        if self.is_shared and not all(isinstance(each, Reading) for each in [*hooks.values()]):
            return activation.clone()
        return activation

    def layer(self) -> int:
        """Return the index of the block that this hook point is in.

        For the name "blocks.3.hook_mlp_out", the result is 3. Raises `ValueError` for a hook point
        outside of the blocks.
        """
        before, _, rest = (self.name or "").partition("blocks.")
        index = rest.split(".")[0]
        if before or not index.isdigit():
            raise ValueError(f"the hook point {self.name!r} is in no block")
        return int(index)

    def add_hook(self, hook: HookFunction, dir: Direction = "fwd", **left_out: Any) -> None:
        """Put a hook function in place at this hook point, as the model's `add_hook` does.

        The hook function stays until the model's `reset_hooks()` is called.
        """
        refuse("add_hook", left_out)
        add(self, self.name or type(self).__name__, hook, dir)


def hook_points(module: nn.Module, path: str = "") -> dict[str, HookPoint]:
    """Return a dictionary from the path of each hook point inside `module` to the hook point.

    `path` is the path of `module` itself. The paths of the hook points begin with it.
    """
    parts = module.named_modules(prefix=path)
    return {name: part for name, part in parts if isinstance(part, HookPoint)}


def name_hook_points(module: nn.Module, path: str = "") -> None:
    """Set the `name` of each hook point inside `module`. `path` is as in `hook_points`."""
    for name, point in hook_points(module, path).items():
        point.name = name


def observed(*points: nn.Module) -> bool:
    """Return whether any of the modules `points` has a hook that works in this run.

    The result is also True if the `forward` of a hook point was replaced, because nnsight replaces
    `forward` to read activations. Modules such as `Attention` call this function to choose: if the
    result is False, they run a fused kernel. If it is True, they compute step by step, so that each
    activation passes through its hook point.
    """
    return any(
        point._forward_pre_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
        or any(getattr(hook, "is_active", True) for hook in [*point._forward_hooks.values()])
        or ("forward" in vars(point) and isinstance(point, HookPoint))
        for point in points
    )


class HookedModule(nn.Module):
    """The base class of all modules with hook points, such as a whole model or one LayerNorm.

    `run_with_cache` returns the activations at the hook points. `run_with_hooks` and `hooks` call
    hook functions, which can change activations and gradients. These three methods also accept the
    path of a submodule, such as "blocks.0.ln1". This path selects the submodule's output. The names
    of methods and arguments are those of TransformerLens.

    The hooks of these methods are called only in the thread that called the method. If a hook
    function itself runs the model, these hooks are not called in this inner run. Hooks of the same
    module are called in the order in which they were put in place. Hooks for a gradient, too, are
    called in this order, and get the gradient of the edited activation.

    While hooks are in place, a module that was compiled with `module.compile()` runs uncompiled,
    because a compiled graph does not call hooks. Do not combine hooks with gradient checkpointing:
    it runs modules again in the backward pass, where the hooks can be missing, so that gradients
    are wrong.
    """

    name: str | None = None
    _keywords: list[str] | None  # those of a call; None if `forward` takes any

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls._keywords = keywords(cls.__call__, cls.forward)

    def _refuse_other(self, function: str, arguments: Iterable[str], *more: str) -> None:
        if self._keywords is not None and "forward" not in vars(self):  # nnsight replaces it
            refuse_unknown(function, arguments, [*more, *self._keywords])

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """A dictionary from the path of each hook point inside this module to the hook point."""
        return hook_points(self)

    def default_points(self) -> dict[str, nn.Module]:
        """Return the hook points that `run_with_cache` captures by default, by path.

        The hook points in `PER_HEAD`, which need much memory, are left out.
        """
        return {
            name: point
            for name, point in self.hook_dict.items()
            if name.split(".")[-1] not in PER_HEAD
        }

    def run_with_cache(
        self,
        *inputs: Any,
        names_filter: Names | None = None,
        remove_batch_dim: bool = False,
        device: str | torch.device | None = None,
        **arguments: Any,
    ) -> tuple[Any, ActivationCache]:
        """Return the output of `self(*inputs, **arguments)`, and an `ActivationCache` of the run.

        `names_filter` selects the activations: one name, several names, or a function that takes
        the name of a hook point and returns whether to capture its activation. A function selects
        the hook points in `SWITCHED` only if it selects nothing else. None selects all hook points
        in `default_points()`. If scores or patterns are selected, attention runs without its fused
        kernel, so that the output can have other rounding errors than without a cache.

        The activations in the cache are detached. Writing into them does not change the model's
        weights. If `remove_batch_dim` is True, the activations have no batch axis; the batch must
        hold one input. The activations are copied to `device`; None leaves them where they are.

        Raises `KeyError` before the module runs, if a name is unknown or `names_filter` selects
        nothing. Raises `RuntimeError` if a selected module does not run or is in several places of
        the model, or if a module changes a captured activation in place.
        """
        self._refuse_other(
            "run_with_cache", arguments, "names_filter", "remove_batch_dim", "device"
        )
        captures = Captures(self, device)
        wanted = self.default_points() if names_filter is None else select(self, names_filter)
        require_hookable(self, wanted)
        hooks = [(module, Reading(name, captures.capture)) for name, module in wanted.items()]
        with Placed(self, hooks):
            output = self(*inputs, **arguments)
        require_runs(hooks, some=names_filter is None or callable(names_filter))
        captures.require_unchanged()
        cache = ActivationCache(captures.activations, self)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return output, cache

    def run_with_hooks(
        self, *inputs: Any, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), **arguments: Any
    ) -> Any:
        """Run `self(*inputs, **arguments)` with temporary hook functions, and return the output.

        `fwd_hooks` and `bwd_hooks` are lists of pairs (names, function); see the method `hooks`.
        """
        self._refuse_other("run_with_hooks", arguments, "fwd_hooks", "bwd_hooks")
        with self.hooks(fwd_hooks, bwd_hooks):
            return self(*inputs, **arguments)

    @checks_keywords
    def hooks(
        self, fwd_hooks: Hooks = (), bwd_hooks: Hooks = ()
    ) -> AbstractContextManager["HookedModule"]:
        """Put hook functions in place for all runs inside a `with` block.

        `fwd_hooks` and `bwd_hooks` are lists of pairs (names, function). In each pair, `names`
        selects activations, like `names_filter` in `run_with_cache`. For each activation that a
        pair in `fwd_hooks` selects, the forward pass calls `function(activation, hook=hook_point)`.
        The function may change the activation in place, or return a replacement of the same shape,
        dtype and device.

        The functions in `bwd_hooks` get the gradient of the activation instead, and may change or
        replace it in the same way. They are called in the backward pass of a run that was made
        inside the block. This backward pass may come after the block.

        Raises `TypeError` for anything but such pairs, and `KeyError` if a name is unknown or
        `names` selects nothing. Raises `ValueError` for a replacement of another shape, dtype or
        device, and `RuntimeError` if a selected module does not run inside the block.
        """
        groups = [(names, self._hooks(names, each)) for names, each in pairs(fwd_hooks)]
        for names, each in pairs(bwd_hooks):
            groups.append((names, self._hooks(names, each, EditingGradient)))

        def check() -> None:
            for names, group in groups:
                require_runs(group, some=callable(names))

        placements = [hook for _, group in groups for hook in group]
        require_hookable(self, {hook.name: module for module, hook in placements})
        return Placed(self, placements, check)

    def add_hook(
        self, name: Names, hook: HookFunction, dir: Direction = "fwd", **left_out: Any
    ) -> None:
        """Put a hook function in place until `reset_hooks()` is called.

        `hook(activation, hook=hook_point)` is called as in the method `hooks`. Prefer that method
        or `run_with_hooks`, which remove their hooks. The hooks of `add_hook` are called in every
        thread. Raises the errors of `hooks`, and `ValueError` if `dir` is neither "fwd" nor "bwd".
        For TransformerLens's other arguments, raises a `TypeError` that says what to use instead.
        """
        refuse("add_hook", left_out)
        selected = select(self, name)
        require_hookable(self, selected)
        for path, module in selected.items():
            add(module, path, hook, dir)

    def reset_hooks(self, including_permanent: bool = True, **left_out: Any) -> None:
        """Remove all hooks that `add_hook` put in place.

        `including_permanent` changes nothing, because no hook is permanent. TransformerLens's other
        arguments, in `left_out`, raise a `TypeError` that says what to use instead.
        """
        refuse("reset_hooks", left_out)
        for module in self.modules():
            for each in [*module._forward_hooks.values()]:
                if isinstance(each, Editing) and each.thread is None:
                    remove(module, each)

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile this module, as `nn.Module.compile` does. `add_hook` then raises an error.

        Raises `RuntimeError` for a module with hooks of `add_hook`: compiled blocks can share one
        graph, and the graph of a block without hooks calls none.
        """
        for name in edited_modules(self):
            raise RuntimeError(f"{name!r} has a hook, which compiled graphs lose; reset_hooks()")
        super().compile(*arguments, **options)
        compiled.add(self)

    def _hooks(
        self, names: Names, function: HookFunction, kind: type[Editing] = Editing
    ) -> list[Placement]:
        selected = select(self, names)
        return [(module, kind(name, function)) for name, module in selected.items()]
