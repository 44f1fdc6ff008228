"""`StandIn`: temporarily replaces a method of one module. `reassigned` finds other replacements."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

Method = Callable[..., Any]


class StandIn(AbstractContextManager["StandIn"]):
    """Replaces `module.<name>` until `restore()` is called or the `with` block ends.

    `make(below)` must return the replacement. `below` is the method that is replaced, which the
    replacement may call.

    One method can have several stand-ins, which form a stack. The `below` of the first stand-in is
    the original method. The `below` of each later stand-in is the replacement that the previous
    stand-in made. The stand-ins can be removed in any order. When a stand-in is added or removed,
    `make` is called again for all stand-ins of the method.

    The replacement must still work after a deep copy of the module. So `make` must return a bound
    method, a `functools.partial` or a callable object, not a closure that uses the module. A deep
    copy does not copy closures, so the closure would still use the original module. If
    `module.<name>` is not a method but another attribute of the class, `make` may return any value.
    If `make` raises an error when the stand-in is created, nothing is replaced.
    """

    def __init__(self, module: nn.Module, name: str, make: Callable[[Any], Any]):
        self.module, self.name, self.make = module, name, make
        stacks = vars(module).setdefault("_stand_ins", {})
        now = vars(module).get(name)
        if name not in stacks or stacks[name].top is not now:
            # This is the first stand-in of the method, or other code has assigned the attribute
            # since the last stand-in was made.
            stacks[name] = Stack(now)
        stacks[name].stand_ins.append(self)
        try:
            self._rebuild()
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Remove this stand-in. A second call does nothing.

        If other code has assigned `module.<name>` meanwhile, the assigned value stays.
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
            return  # other code has assigned the attribute; leave its value
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
    """The stand-ins (replacements) of one method of one module, the oldest first.

    `bottom` is the method that was assigned to the module before the first stand-in, or None if the
    module used the method of its class. `top` is the replacement that the newest stand-in made, or
    `bottom` if there is no stand-in.
    """

    def __init__(self, bottom: Method | None):
        self.bottom = self.top = bottom
        self.stand_ins: list[StandIn] = []


def stand_ins(module: nn.Module) -> list[StandIn]:
    """Return all stand-ins for methods of `module`, without the stand-ins of its submodules."""
    return [
        each for stack in vars(module).get("_stand_ins", {}).values() for each in stack.stand_ins
    ]


def reassigned(module: nn.Module, name: str) -> bool:
    """Return whether other code than a `StandIn` has assigned the method `name` of `module`."""
    own = vars(module)
    if name not in own:
        return False
    stack = own.get("_stand_ins", {}).get(name)
    return stack is None or stack.top is not own[name] or stack.bottom is not None
