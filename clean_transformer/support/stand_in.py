"""`StandIn`: replaces a method of one module for a while."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

Method = Callable[..., Any]


class StandIn(AbstractContextManager["StandIn"]):
    """Replaces `module.<name>` until `restore()` is called or the `with` block ends.

    `make(below)` returns the replacement; `below` is the method that was there before. One method
    can have several stand-ins: each calls the one below it, and they can be restored in any order.

    When a stand-in is restored, `make` is called again for those above it. What `make` returns must
    survive a deep copy of the module: return a bound method, a `functools.partial` or a callable
    object, not a closure over the module. `make` may also ignore `below`, and it may return any
    other value, if `<name>` is a plain attribute of the class. If it raises an error, nothing is
    replaced.
    """

    def __init__(self, module: nn.Module, name: str, make: Callable[[Any], Any]):
        self.module, self.name, self.make = module, name, make
        stacks = vars(module).setdefault("_stand_ins", {})
        now = vars(module).get(name)
        if name not in stacks or stacks[name].top is not now:
            # This is the first stand-in, or other code has assigned the attribute since.
            stacks[name] = Stack(now)
        stacks[name].stand_ins.append(self)
        try:
            self._rebuild()
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Remove this stand-in. A second call does nothing.

        If other code has assigned `module.<name>` meanwhile, that assignment stays.
        """
        stack = vars(self.module).get("_stand_ins", {}).get(self.name)
        if stack is None or self not in stack.stand_ins:
            return
        stack.stand_ins.remove(self)
        self._rebuild()

    def _rebuild(self) -> None:
        attributes = vars(self.module)
        stack = attributes["_stand_ins"][self.name]
        if not stack.stand_ins:
            del attributes["_stand_ins"][self.name]
        if not attributes["_stand_ins"]:
            del attributes["_stand_ins"]
        if attributes.get(self.name) is not stack.top:
            return  # assigned by other code
        attributes.pop(self.name, None)
        stack.top = None
        if stack.bottom is None and not stack.stand_ins:
            return
        method = getattr(self.module, self.name) if stack.bottom is None else stack.bottom
        for stand_in in stack.stand_ins:
            method = stand_in.make(method)
        attributes[self.name] = stack.top = method

    def __exit__(self, *_: object) -> None:
        self.restore()


class Stack:
    """The stand-ins of one method, the first one lowest.

    `bottom` is what the instance itself had before the first stand-in, or None if it used the
    class's method. `top` is what is called now.
    """

    def __init__(self, bottom: Method | None):
        self.bottom = self.top = bottom
        self.stand_ins: list[StandIn] = []


def stand_ins(module: nn.Module) -> list[StandIn]:
    """All stand-ins on the methods of this one module, not on those of its submodules."""
    return [
        each for stack in vars(module).get("_stand_ins", {}).values() for each in stack.stand_ins
    ]
