"""Runs the oracle: the same model in float64 on the CPU, whose results count as exact.

When the oracle has computed an activation, the device's value replaces the exact value. So the
oracle computes every activation from the inputs that the operation had on the device.
"""

from collections import UserDict, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clean_transformer.hooks import HookedModule
from clean_transformer.modules.attention import Attention
from clean_transformer.parity.activations.bounds import formula_of
from clean_transformer.support.numerics import upcast

# The activations with a number for each pair of a query and a key. The oracle computes them one
# head at a time.
OF_PAIRS = ("hook_attn_scores", "hook_pattern")
# An MLP is judged at this many positions at a time.
AT_A_TIME = 256
# The index of the head axis, for each activation that has a head axis.
HEAD_AXIS = {
    "hook_q": 2,
    "hook_k": 2,
    "hook_v": 2,
    "hook_z": 2,
    "hook_result": 2,
    "hook_attn_scores": 1,
    "hook_pattern": 1,
}


def run_oracle(
    oracle: HookedModule,
    device: dict[str, Tensor],
    inputs: Iterable[Tensor],
    judge: Callable[[str, int, Tensor, Tensor, "InFloat64"], None],
) -> None:
    """Run `oracle`, the module in float64, and call `judge` for each activation in `device`.

    `device` maps the names of activations to the device's values. `judge` gets the activation's
    name, the index of a head, the device's value, the exact value, and the device's activations of
    the same module. Then the device's value replaces the exact value in the run.

    `judge` is called once for each attention head of the scores and of the pattern, with the
    activations of this head only, because those of all heads need much memory. For every other
    activation, it is called once for all heads, and the index is 0.
    """
    seen: dict[str, dict[str, Tensor]] = defaultdict(dict)
    # The head that the oracle computes now, by the path of its attention module.
    heads: dict[str, int] = {}

    def mix_by_head(
        path: str, attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: None
    ) -> Tensor:
        z = []
        for head in range(q.shape[2]):
            heads[path] = head
            of_head = (x[:, :, head : head + 1] for x in (q, k, v))
            z.append(Attention.mix_explicitly(attention, *of_head, mask=mask))
        return torch.cat(z, dim=2)

    def take_inputs(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        for index, tensor in enumerate(tensors):
            seen[name][f"input {index}" if index else "input"] = tensor

    def record_and_replace(name: str, _: nn.Module, args: Any, value: Tensor) -> Tensor:
        owner, point = owner_of(name)
        seen[owner][point] = got = device[name]
        given, head = InFloat64(seen[owner]), 0
        if point in OF_PAIRS and owner in heads:
            head = heads[owner]
            got, given = got.narrow(HEAD_AXIS[point], head, 1), given.of_head(head)
        judge(name, head, got, value, given)
        return upcast(got)

    with ExitStack() as placed:
        for name, part in oracle.named_modules():
            if isinstance(part, HookedModule):
                handle = part.register_forward_pre_hook(partial(take_inputs, name))
                placed.callback(handle.remove)
            if isinstance(part, Attention) and formula_of(part):
                by_head = partial(mix_by_head, name, part)
                setattr(part, "mix_explicitly", by_head)  # noqa: B010
                placed.callback(delattr, part, "mix_explicitly")
            if name in device:
                handle = part.register_forward_hook(partial(record_and_replace, name))
                placed.callback(handle.remove)
        oracle(*(upcast(x) for x in inputs))


class InFloat64(UserDict[str, Tensor]):
    """A dictionary of tensors that converts a tensor to float64 only when it is read."""

    def __getitem__(self, name: str) -> Tensor:
        return upcast(self.data[name])

    def of_head(self, head: int) -> "InFloat64":
        """Return the activations that have a head axis, for the attention head number `head`."""
        split = {name: axis for name, axis in HEAD_AXIS.items() if name in self.data}
        return InFloat64({n: self.data[n].narrow(axis, head, 1) for n, axis in split.items()})

    def from_position(self, start: int) -> "InFloat64":
        """Return the activations [batch pos …] at AT_A_TIME positions, from `start` on."""
        return InFloat64({n: x[:, start : start + AT_A_TIME] for n, x in self.data.items()})


def owner_of(name: str) -> tuple[str, str]:
    """Split an activation's name: "blocks.0.attn.hook_q" gives ("blocks.0.attn", "hook_q").

    If the activation is the output of a module, the result is (path of the module, "output").
    """
    owner, point = name.rpartition(".")[::2]
    return (owner, point) if point.startswith("hook_") else (name, "output")
