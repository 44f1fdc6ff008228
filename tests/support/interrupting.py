"""Interrupts each operation at random moments, and fails if something is left in the model.

`python -m tests.support.interrupting MOMENTS` is a process of its own, without the checks of shapes
with which the tests run: these wrap each function in others, which a Ctrl-C can break off, too.
"""

import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from clean_transformer.model import DemoTransformer
from clean_transformer.swapping.effects import effect
from clean_transformer.swapping.swaps import swap
from clean_transformer.variants.mlp import ReluMLP
from tests.helpers import random_model, random_tokens

TOKENS = random_tokens()
# Another process sends the signal, so that this one need not give up the GIL for it.
SENDER = """
import os, signal, sys, time
for line in sys.stdin:
    end = time.perf_counter() + float(line)
    while time.perf_counter() < end:
        pass
    os.kill(os.getppid(), signal.SIGINT)
"""


class Sender:
    """Sends this process a Ctrl-C."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", SENDER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        self.interrupt(lambda: None, 0.0)  # wait until the process has started

    def interrupt(self, operation: Callable[[], object], seconds: float) -> None:
        """Run the operation, with a Ctrl-C after some seconds, which may be after its end."""
        try:
            print(seconds, file=self.process.stdin, flush=True)
            operation()
            for _ in range(10_000):
                time.sleep(0.001)
        except KeyboardInterrupt:
            return
        raise AssertionError("the Ctrl-C was lost")


def edit(activation, hook):
    return activation + 1


def swapped(model: DemoTransformer) -> None:
    with swap(model, "blocks.*.mlp", ReluMLP):
        model(TOKENS)


def optimized(model: DemoTransformer) -> None:
    with model.optimize("int8"), torch.no_grad():
        model(TOKENS)


def with_hooks(model: DemoTransformer) -> None:
    with model.hooks([("hook_embed", edit)]):
        model(TOKENS)


OPERATIONS: dict[str, Callable[[DemoTransformer], object]] = {
    "run_with_cache": lambda model: model.run_with_cache(TOKENS),
    "run_with_hooks": lambda model: model.run_with_hooks(
        TOKENS, fwd_hooks=[(name, edit) for name in model.hook_dict if name.endswith("hook_z")]
    ),
    "hooks": with_hooks,
    "swap": swapped,
    "optimize": optimized,
}


def state(model: DemoTransformer) -> list[Any]:
    """All that an operation changes in a model or in this process, apart from values."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_modules")
    parts = [
        (
            path,
            id(module),
            sorted({*vars(module)} - {"name"}),
            module._compiled_call_impl,
            *([*getattr(module, each).items()] for each in hooks),
        )
        for path, module in model.named_modules()
    ]
    return [signal.getsignal(signal.SIGINT), *parts]


def check(
    name: str, sender: Sender, model: DemoTransformer, run: Callable[[], object], moments: int
) -> None:
    run()
    began = time.perf_counter()
    for _ in range(5):
        run()
    seconds = (time.perf_counter() - began) / 5
    before, generator = state(model), random.Random(0)
    for moment in range(moments):
        sender.interrupt(run, generator.uniform(0, 1.2 * seconds))
        # An interrupt inside PyTorch's own `no_grad().__enter__` leaves gradients off.
        torch.set_grad_enabled(True)
        assert state(model) == before, f"{name}, moment {moment}"


def main(moments: int) -> None:
    sender = Sender()
    for name, operation in OPERATIONS.items():
        model = random_model(dtype=torch.float32)
        if name != "optimize":
            model.blocks[1]._compiled_call_impl = model.blocks[1]._call_impl
        check(name, sender, model, lambda: operation(model), moments)  # noqa: B023
    model = random_model(dtype=torch.float32)
    with swap(model, "blocks.*.mlp", ReluMLP) as new:
        check("effect", sender, model, lambda: effect(model, new, TOKENS), moments)
    sender.process.kill()


if __name__ == "__main__":
    # A shell's background jobs ignore Ctrl-C, and their processes with them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]))
