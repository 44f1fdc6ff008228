"""Forward hooks that read or edit a module's output, or edit the gradient of the output."""

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal, SupportsIndex, TypeVar

from torch import Tensor, nn

from clean_transformer.support.interrupts import Undoable
from clean_transformer.support.stand_in import StandIn
from clean_transformer.support.validation import refuse_other

Root = TypeVar("Root", bound=nn.Module)


class _Running(threading.local):
    """`hooks` are the hooks whose functions now run in this thread, one inside the other."""

    def __init__(self) -> None:
        self.hooks: tuple[Reading, ...] = ()


_running = _Running()
# The modules on which the method `compile` was called.
compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# `register_forward_hook` increments a global counter. Two threads must not do this at once.
_registering = threading.Lock()


class Reading:
    """A forward hook that calls `function(output, hook=module)` and ignores the result.

    `name` is the path of the module in the model. While the function runs, `module.name` is `name`.
    The hook calls the function only in the thread that created the hook, and not if another hook
    function runs the module. If the attribute `thread` is None, the hook calls the function in
    every thread, and in all runs but those that the function of such a hook makes. `has_run` says
    whether the function was called.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name, self.function, self.has_run = name, function, False
        self.thread: int | None = threading.get_ident()
        self.depth = len(_running.hooks)

    @property
    def is_active(self) -> bool:
        """Whether the hook calls its function, if the module runs in this thread now."""
        if self.thread is None:
            return all(each.thread is not None for each in _running.hooks)
        return self.thread == threading.get_ident() and self.depth == len(_running.hooks)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        """Call the function, unless the hook must do nothing. Return the new output, or None."""
        if not self.is_active:
            return None
        self.has_run = True
        return self.apply(module, output)

    def apply(self, module: nn.Module, output: Tensor) -> Tensor | None:
        """Call the function. Return the new output of the module, or None for no change."""
        self.call(module, output)
        return None

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # `add_hook` sets `thread` to None.
        if self.thread is not None:
            raise RuntimeError(
                f"{self.name} has a temporary hook, which a copy of the model would keep for good; "
                "copy or pickle the model outside of the `with` block and of hook functions"
            )
        return super().__reduce_ex__(protocol)

    def call(self, module: nn.Module, value: Tensor) -> Any:
        """Return `function(value, hook=module)`. Meanwhile, `module.name` is `name`."""
        before: Any = getattr(module, "name", None)
        module.name = self.name  # type: ignore[assignment, unused-ignore]
        running, _running.hooks = _running.hooks, (*_running.hooks, self)
        try:
            return self.function(value, hook=module)
        finally:
            _running.hooks = running
            module.name = before


class Editing(Reading):
    """A forward hook whose function edits the output of a module.

    The function gets a copy of the output. It edits the copy in place, or returns a replacement.
    The module's new output is a copy of the result, so that the function may keep its tensors.
    Raises `TypeError` if the function returns anything but a tensor or None. Raises `ValueError` if
    the replacement has another shape, dtype or device than the output.
    """

    def apply(self, module: nn.Module, output: Tensor) -> Tensor:
        """Return a copy of the output that the function edited or returned."""
        return self.edited(module, output, "activation")

    def edited(self, module: nn.Module, value: Tensor, what: str) -> Tensor:
        """Let the function edit a copy of `value`, and return a copy of the result.

        `what` is the word for `value` in error messages.
        """
        # Edit a copy: other tensors may share the memory, and autograd may need the old values.
        copy = value.clone()
        given = self.call(module, copy)
        if given is None:
            given = copy
        if not isinstance(given, Tensor):
            raise TypeError(
                f"the hook at {self.name} returned a {type(given).__name__}; return a tensor in "
                f"place of the {what}, or None"
            )
        for wanted in ("shape", "dtype", "device"):
            has, needs = getattr(given, wanted), getattr(value, wanted)
            if has != needs:
                raise ValueError(
                    f"the hook at {self.name} returned {wanted} {_plain(has)}; the {what} has "
                    f"{wanted} {_plain(needs)}"
                )
        return given.clone()  # The function may have kept `given`, and may change it later.


class EditingGradient(Editing):
    """A forward hook whose function edits the gradient of the module's output.

    The backward pass calls the function. The forward pass raises `RuntimeError` if the output does
    not require a gradient.
    """

    def apply(self, module: nn.Module, output: Tensor) -> Tensor:
        """Return a new view of `output`, and register the function on the gradient of this view."""
        if not output.requires_grad:
            raise RuntimeError(
                f"the backward hook at {self.name} cannot run: the activation needs no gradient; "
                "run without torch.no_grad(), with parameters that require gradients"
            )
        view: Any = output.view_as(output)
        view.register_hook(lambda gradient: self.edited(module, gradient, "gradient"))
        return view


Direction = Literal["fwd", "bwd"]
Placement = tuple[nn.Module, Reading]


def register(module: nn.Module, hook: Reading) -> None:
    """Register the forward hook on the module.

    Hooks are called in the order of their registration, but those for gradients after all others,
    the newest first. So a function for a gradient gets the gradient of the edited activation, and
    the backward pass, which goes from the last view to the first, calls the oldest function first.
    """
    with _registering:
        module.register_forward_hook(hook)
        for key, each in [*module._forward_hooks.items()]:
            if isinstance(each, EditingGradient) and each is not hook:
                module._forward_hooks.move_to_end(key)  # type: ignore[attr-defined, unused-ignore]


def add(module: nn.Module, name: str, function: Callable[..., Any], direction: Direction) -> None:
    """Register a hook that edits the output ("fwd") or its gradient ("bwd") in every thread.

    Raises `TypeError` if `function` cannot be called, `ValueError` for another direction, and
    `RuntimeError` if the module is in a module that was compiled with `module.compile()`.
    """
    refuse_other("dir", direction, "fwd", "bwd")
    if not callable(function):
        raise TypeError(f"the hook for {name} is {function!r}; give a function")
    for root in [*compiled]:
        if root._compiled_call_impl is not None and module in {*root.modules()}:
            raise RuntimeError(
                f"{name} is in a {type(root).__name__} that was compiled with compile(), and its "
                "graph does not call hooks that are added now; use run_with_hooks or "
                "`with model.hooks(...)`, or add the hook to a model that is not compiled"
            )
    hook = {"fwd": Editing, "bwd": EditingGradient}[direction](name, function)
    hook.thread = None
    register(module, hook)


def edited_modules(root: nn.Module, path: str = "") -> list[str]:
    """Return the paths of all modules in `root` that have a hook which edits their output.

    `path` is the path of `root` itself. The paths begin with it.
    """
    return [
        name
        for name, module in root.named_modules(prefix=path)
        if any(isinstance(each, Editing) for each in module._forward_hooks.values())
    ]


def remove(module: nn.Module, hook: Reading) -> None:
    """Remove the forward hook from the module. If the module does not have it, do nothing."""
    for key, each in [*module._forward_hooks.items()]:
        if each is hook:
            module._forward_hooks.pop(key, None)


def require_runs(hooks: Iterable[Placement], *, some: bool) -> None:
    """Raise `RuntimeError` if a module did not run; if `some` is True, one that ran is enough.

    `some` is for hooks that a function selected. For example, with `stop_at_layer`, later blocks do
    not run.
    """
    idle = {hook.name: module for module, hook in hooks if not hook.has_run}
    if not idle or (some and any(hook.has_run for _, hook in hooks)):
        return
    name, module = next(iter(idle.items()))
    inside = [f"{name}.{each}" for each, _ in module.named_modules() if each][:3]
    raise RuntimeError(
        f"{name} did not run, so its hook was not called"
        + (f"; did you mean {' or '.join(inside)}?" if inside else "")
    )


class Placed(Undoable[Root]):
    """Registers `hooks` on modules of `root`, and removes the hooks at the end of a `with` block.

    `with Placed(root, hooks) as model` sets `model` to `root`. Inside the block, modules that were
    compiled with `module.compile()` run uncompiled, because a compiled graph does not call hooks
    that were registered after the compilation. A Ctrl-C at any moment leaves no hook behind. If the
    block ends without an error, the function `check` is called, which can raise an error.
    """

    def __init__(
        self, root: Root, hooks: Iterable[Placement], check: Callable[[], object] = lambda: None
    ):
        self.root, self.placements, self.check = root, [*hooks], check
        self.uncompiled: list[StandIn] = []
        super().__init__(Placed.__enter__, Placed.__exit__)

    def make(self) -> None:
        """Register the hooks. Modules that were compiled run uncompiled."""
        for each in self.root.modules():
            if each._compiled_call_impl is not None:
                self.uncompiled.append(StandIn(each, "_compiled_call_impl", _no_call))
        for module, hook in self.placements:
            register(module, hook)

    def unmake(self) -> None:
        """Remove the hooks. Modules that were compiled run compiled again."""
        for module, hook in self.placements:
            remove(module, hook)
        while self.uncompiled:
            self.uncompiled.pop().restore()

    def __enter__(self) -> Root:
        self.begin()
        return self.root

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.end()
        if error is None:
            self.check()


def _no_call(below: object) -> None:
    """Return None. In the place of `_compiled_call_impl`, it makes a module run uncompiled."""


def _plain(value: object) -> object:
    return [*value] if isinstance(value, tuple) else value
