"""Hooks on modules that read or edit what a module returns, or the gradient of what it returns."""

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from clean_transformer.support.interrupts import Interrupts
from clean_transformer.support.stand_in import StandIn

Root = TypeVar("Root", bound=nn.Module)


class _Running(threading.local):
    """`depth` counts the hook functions that the current thread is inside of."""

    depth = 0


_running = _Running()
# `register_forward_hook` increments a global counter, which two threads must not do at once.
_registering = threading.Lock()


class Reading:
    """A forward hook that calls `function(output, hook=module)` and ignores what it returns.

    `name` is the path of the module in the model; `module.name` is set to it. Only the thread that
    made the hook calls the function. The function is not called for runs of the module that a hook
    function starts. `has_run` says whether the function was called.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name, self.function, self.has_run = name, function, False
        self.thread: int | None = threading.get_ident()
        self.depth = _running.depth

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        """Call the function, unless another thread or a hook function runs the module."""
        if self.thread not in (None, threading.get_ident()) or _running.depth != self.depth:
            return None
        self.has_run = True
        module.name = self.name  # type: ignore[assignment, unused-ignore]
        return self.apply(module, output)

    def apply(self, module: nn.Module, output: Tensor) -> Tensor | None:
        """Call the function. Return what replaces the module's output; None replaces nothing."""
        self.call(module, output)
        return None

    def call(self, module: nn.Module, value: Tensor) -> Any:
        """Return `function(value, hook=module)`."""
        _running.depth += 1
        try:
            return self.function(value, hook=module)
        finally:
            _running.depth -= 1


class Editing(Reading):
    """A forward hook whose function edits a copy of the output in place, or returns another.

    Raises `TypeError` or `ValueError` for a returned value that does not fit.
    """

    def apply(self, module: nn.Module, output: Tensor) -> Tensor:
        """Return the edited copy of `output`, or what the function returned."""
        return self.edited(module, output, "activation")

    def edited(self, module: nn.Module, value: Tensor, what: str) -> Tensor:
        """Return `value` after the edit. `what` names the value in error messages."""
        # Other modules may hold the same memory, and autograd may need the value as it was.
        copy = value.clone()
        given = self.call(module, copy)
        if given is None:
            return copy
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
        return given


class EditingGradient(Editing):
    """A forward hook whose function edits the gradient of the output, in the backward pass.

    Raises `RuntimeError` if no gradient will be computed.
    """

    def apply(self, module: nn.Module, output: Tensor) -> Tensor:
        """Return a new view of `output`. The function gets the gradient of this view."""
        if not output.requires_grad:
            raise RuntimeError(
                f"the backward hook at {self.name} cannot run: the activation needs no gradient; "
                "run without torch.no_grad(), with parameters that require gradients"
            )
        view = output.view_as(output)
        view.register_hook(lambda gradient: self.edited(module, gradient, "gradient"))  # type: ignore[no-untyped-call]
        return view


Placement = tuple[nn.Module, Reading]


def register(module: nn.Module, hook: Reading) -> None:
    """Register the forward hook."""
    with _registering:
        module.register_forward_hook(hook)


def remove(module: nn.Module, hook: Reading) -> None:
    """Remove the forward hook, if the module has it."""
    for key, each in [*module._forward_hooks.items()]:
        if each is hook:
            module._forward_hooks.pop(key, None)


class Placed(AbstractContextManager[Root], Generic[Root]):
    """Registers hooks on submodules of `root` for a `with` block, whose `as` gets `root`.

    Inside the block, modules that were compiled with `compile()` run uncompiled, because a compiled
    graph does not call hooks that were registered later. A Ctrl-C at any moment leaves no hook
    behind. If the block ends without an error, `check` is called.
    """

    def __init__(
        self, root: Root, hooks: Iterable[Placement], check: Callable[[], object] = lambda: None
    ):
        self.root, self.placements, self.check = root, [*hooks], check

    def __enter__(self) -> Root:
        self.interrupts = Interrupts(Placed.__exit__)
        self.uncompiled: list[StandIn] = []
        try:
            for each in self.root.modules():
                if each._compiled_call_impl is not None:
                    self.uncompiled.append(StandIn(each, "_compiled_call_impl", _no_call))
            for module, hook in self.placements:
                register(module, hook)
            self.interrupts.deliver()
        except BaseException:
            self.remove()
            raise
        self.interrupts.waits = False
        return self.root

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.interrupts.waits = True
        self.remove()
        if error is None:
            self.check()

    def remove(self) -> None:
        """Remove the hooks, and let the compiled modules run compiled again."""
        try:
            for module, hook in self.placements:
                remove(module, hook)
            for stand_in in self.uncompiled:
                stand_in.restore()
        finally:
            self.interrupts.close()


def _no_call(below: object) -> None:
    """Return what `_compiled_call_impl` is in a module that is not compiled."""


def _plain(value: object) -> object:
    return [*value] if isinstance(value, tuple) else value
