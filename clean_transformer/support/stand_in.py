"""`StandIn`: another method in the place of a module's own, for a while."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

from torch import nn

Method = Callable[..., Any]


class StandIn(AbstractContextManager["StandIn"]):
    """Replaces `module.<name>` until `restore` or the end of a `with` block.

    `make` gets the method that was there before and returns the one to call instead. Several
    stand-ins can be put on one method. They nest in the order in which they were put, and each can
    be taken away at any time: the others stay. `make` is called again whenever one below it is
    taken away, so it must return an object that a copy of the module can own (a bound method, a
    `functools.partial`, a callable object; not a closure over the module).
    """

    def __init__(self, module: nn.Module, name: str, make: Callable[[Method], Method]):
        self.module, self.name, self.make = module, name, make
        stacks = vars(module).setdefault("_stand_ins", {})
        now = vars(module).get(name)
        if name not in stacks or stacks[name].top is not now:
            # Somebody else has put a method on this instance, or nobody has: that is the bottom.
            stacks[name] = Stack(now)
        stacks[name].stand_ins.append(self)
        self._rebuild()

    def restore(self) -> None:
        """Take this stand-in away. A second call does nothing.

        A method that somebody else has put in its place meanwhile stays there.
        """
        stack = vars(self.module).get("_stand_ins", {}).get(self.name)
        if stack is None or self not in stack.stand_ins:
            return
        stack.stand_ins.remove(self)
        self._rebuild()

    def _rebuild(self) -> None:
        attributes = vars(self.module)
        stack = attributes["_stand_ins"][self.name]
        is_ours = attributes.get(self.name) is stack.top
        if not stack.stand_ins:
            del attributes["_stand_ins"][self.name]
        if not attributes["_stand_ins"]:
            del attributes["_stand_ins"]
        if not is_ours:
            return
        method = stack.bottom or MethodType(getattr(type(self.module), self.name), self.module)
        for stand_in in stack.stand_ins:
            method = stand_in.make(method)
        if stack.stand_ins or stack.bottom:
            attributes[self.name] = stack.top = method
        else:
            del attributes[self.name]

    def __exit__(self, *_: object) -> None:
        self.restore()


class Stack:
    """The stand-ins of one method. `bottom` is the method below them, None for the class's own."""

    def __init__(self, bottom: Method | None):
        self.bottom = self.top = bottom
        self.stand_ins: list[StandIn] = []
