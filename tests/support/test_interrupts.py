"""A Ctrl-C at any moment leaves the model as it was."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from clean_transformer.support.interrupts import Interrupts, Undoable
from clean_transformer.swapping.swaps import swap
from clean_transformer.variants.mlp import ReluMLP
from tests.helpers import random_model


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """In a shell's background job, Python ignores Ctrl-C until it is told otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("moments", [20, pytest.param(2000, marks=pytest.mark.slow)])
def test_an_interrupted_operation_leaves_nothing_behind(moments: int):
    command = [sys.executable, "-m", "tests.support.interrupting", str(moments)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_waiting_interrupt_is_raised_at_the_end():
    steps = []

    def run() -> None:
        with Interrupts():
            signal.raise_signal(signal.SIGINT)
            steps.append("not broken off")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert steps
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_is_let_in_and_what_follows_is_not_broken_off():
    steps = []

    def run() -> None:
        with Interrupts() as interrupts:
            try:
                interrupts.let_in(signal.raise_signal, signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                steps.append("undone")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert steps


def test_an_outer_change_does_not_delay_what_comes_in_an_inner_one():
    """A Ctrl-C while an inner change begins or ends need not wait for the end of the outer one."""
    outside = []

    class Inner(Undoable["Inner"]):
        def make(self) -> None:
            """Let the signal come inside of `begin`, before this change waits for signals."""
            with pytest.raises(KeyboardInterrupt):
                outside[0](signal.SIGINT, sys._getframe(1))

        unmake = make  # inside of `end`

    with swap(random_model(), "blocks.*.mlp", ReluMLP):
        outside.append(signal.getsignal(signal.SIGINT))
        Inner().begin().end()


def test_the_closing_order_does_not_matter():
    before = signal.getsignal(signal.SIGINT)
    first, second = Interrupts(), Interrupts()
    first.close()
    second.close()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_swap_that_stays_lets_interrupts_through():
    model = random_model()
    new = swap(model, "blocks.*.mlp", ReluMLP)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert new.is_in(model)
    new.restore()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_swap_that_nobody_keeps_gives_the_handler_back():
    swap(random_model(), "blocks.*.mlp", ReluMLP)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_handler_outside_of_python_stays(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_do_not_touch_the_handler():
    seen = []

    def work() -> None:
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
