"""Delays Ctrl-C while a model is changed, so that each change is complete or undone."""

import signal
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from inspect import unwrap
from threading import current_thread, main_thread
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")
Entered = TypeVar("Entered")
# Some versions of beartype cannot read the bound "Undoable[Any]".
Change = TypeVar("Change", bound="Undoable")  # type: ignore[type-arg]


class Interrupts(AbstractContextManager["Interrupts"]):
    """Delays a Ctrl-C until `close()` is called or the `with` block ends.

    A delayed Ctrl-C then calls the earlier signal handler, which usually raises
    `KeyboardInterrupt`. If the attribute `waits` is set to False, a Ctrl-C is delayed only while
    Python runs the body of one of the methods `guarded` of the object `owner`. In a thread other
    than the main thread, this class does nothing, because Python calls signal handlers only in the
    main thread.
    """

    def __init__(self, owner: object = None, *guarded: Callable[..., Any]):
        self.waits, self._pending, self._closed = True, False, False
        self._guarded = {unwrap(function).__code__ for function in guarded}
        self._owner = id(owner)  # the signal handler must not keep the owner alive
        self._before: Any = signal.getsignal(signal.SIGINT)
        if callable(self._before) and current_thread() is main_thread():
            signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.waits or (frame is not None and self._guards(frame)):
            self._pending = True
        else:
            self._before(number, frame)

    def _guards(self, frame: FrameType) -> bool:
        return frame.f_code in self._guarded and id(frame.f_locals.get("self")) == self._owner

    def let_in(self, run: Callable[..., Result], *inputs: Any, **arguments: Any) -> Result:
        """Return `run(*inputs, **arguments)`. A Ctrl-C during this call is not delayed."""
        self.waits = False
        try:
            return run(*inputs, **arguments)
        finally:
            self.waits = True

    def deliver(self) -> None:
        """Call the earlier signal handler if a Ctrl-C was delayed."""
        if self._pending:
            self._pending = False
            self._before(signal.SIGINT, None)

    def close(self) -> None:
        """Put the earlier signal handler back, and call it if a Ctrl-C was delayed."""
        if signal.getsignal(signal.SIGINT) == self._handle and current_thread() is main_thread():
            before = self._before
            # Objects of this class may be closed in another order than they were made.
            while isinstance(owner := getattr(before, "__self__", None), Interrupts):
                if not owner._closed:
                    break
                before = owner._before
            signal.signal(signal.SIGINT, before)
        # Other code may have kept `_handle`, to put it back later.
        self.waits, self._guarded, self._closed = False, set(), True
        self.deliver()

    def __exit__(self, *_: object) -> None:
        self.close()


class Undoable(AbstractContextManager[Entered]):
    """A change that stays until `end` is called or the `with` block ends.

    A subclass makes the change in `make`, and undoes the change in `unmake`. The method `begin`
    calls `make`. A Ctrl-C at any moment leaves the change complete or undone. `callers` are the
    methods of the subclass that call `begin` or `end`: a Ctrl-C is delayed in these methods, too.
    """

    def __init__(self, *callers: Callable[..., Any]):
        self._callers = callers

    @abstractmethod
    def make(self) -> None:
        """Make the change."""

    @abstractmethod
    def unmake(self) -> None:
        """Undo the change. If `make` raised an error, undo what `make` did before the error."""

    def begin(self: Change) -> Change:
        """Make the change, and return this object. After an error, the change is undone."""
        own = (Undoable.__enter__, Undoable.__exit__, Undoable.begin, Undoable.settled)
        self._interrupts = Interrupts(self, *own, Undoable.end, *self._callers)
        self._closer: _Closer | None = _Closer(self._interrupts)
        try:
            self.make()
        except BaseException:
            self.end()
            raise
        return self.settled()

    def settled(self: Change) -> Change:
        """Return this object. If a Ctrl-C was delayed, undo the change, and raise an error instead.

        The error is `KeyboardInterrupt`. From now on, a Ctrl-C is no longer delayed.
        """
        try:
            self._interrupts.deliver()
        except BaseException:
            self.end()
            raise
        self._interrupts.waits = False
        return self

    def end(self) -> None:
        """Undo the change. A second call does nothing."""
        self._interrupts.waits = True
        try:
            with Interrupts():  # an earlier call may have closed `self._interrupts`
                self.unmake()
            if self._closer is not None:
                self._closer.interrupts = None
                self._closer = None
        finally:
            self._interrupts.close()

    def __enter__(self) -> Entered:
        return self.settled()  # type: ignore[return-value]  # a subclass is an `Undoable["Itself"]`

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.end()


class _Closer:
    """Puts the earlier signal handler back if an `Undoable` is deleted before `end` is called."""

    # `Undoable.end` deletes its closer while a Ctrl-C waits, because Python ignores a
    # `KeyboardInterrupt` that comes inside of `__del__`. So `Undoable` itself has no `__del__`.

    def __init__(self, interrupts: Interrupts):
        self.interrupts: Interrupts | None = interrupts

    def __del__(self) -> None:
        if self.interrupts is not None:
            self.interrupts.close()
