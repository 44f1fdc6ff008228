"""Compares one step of AdamW on the device with AdamW's formula in float64."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.attempts import failed_check
from clean_transformer.parity.limits import ELEMENTWISE
from clean_transformer.parity.operations.optimizer import adamw_step
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.uses.rows import elementwise
from clean_transformer.parity.uses.table import Use
from clean_transformer.parity.verdict import Check

# Only parameters with at most this many elements are judged, to save time. This is enough, because
# AdamW updates every element independently.
LARGEST = 2**18
OPTIONS: dict[str, Any] = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
BETAS = {"beta1": 0.9, "beta2": 0.999}
FORMS: dict[str, dict[str, bool]] = {"AdamW": {}, "fused AdamW": {"fused": True}}


def judge_adamw(
    use: Use, parameters: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[tuple[list[Isolated | Check], Callable[[], Any]]]:
    """Check one step of AdamW on the device, with the normal and the fused implementation.

    `parameters` has pairs (parameter, gradient). Yields, for each implementation, a list of
    results and a function that takes the step again. Float16 parameters are first converted to
    float32, as in mixed-precision training.
    """
    small = [pair for pair in parameters if pair[0].numel() <= LARGEST]
    # Float16 cannot represent ε = 1e-8 and the squares of small gradients.
    if parameters and parameters[0][0].dtype == torch.float16:
        small = [(parameter.float(), gradient.float()) for parameter, gradient in small]
    for name, form in FORMS.items() if small else ():
        try:
            before, after = _second_step(small, form)
        except Exception as error:
            yield [failed_check(name, error)], lambda: None
            continue
        with trusted():
            yield _judge(name, use, before, after), partial(_second_step, small, form)


def _second_step(
    parameters: Sequence[tuple[Tensor, Tensor]], form: dict[str, bool]
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Take two steps of AdamW, and return its state on the CPU before and after the second step.

    A state has a list [parameter, gradient, exp_avg, exp_avg_sq] for each parameter.
    """
    # The fused kernel on the CPU is wrong if a parameter and its gradient have different strides.
    # `optimize` changes the strides of parameters, so all tensors are made contiguous here.
    given, gradients = (
        [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in tensors]
        for tensors in zip(*parameters, strict=True)
    )
    for each in given:
        each.requires_grad_()
    for each, gradient in zip(given, gradients, strict=True):
        each.grad = gradient
    optimizer = AdamW(given, betas=(BETAS["beta1"], BETAS["beta2"]), **OPTIONS, **form)

    def state() -> list[list[Tensor]]:
        kept = [optimizer.state[each] for each in given]
        return [
            [x.detach().cpu().clone() for x in (each, gradient, s["exp_avg"], s["exp_avg_sq"])]
            for each, gradient, s in zip(given, gradients, kept, strict=True)
        ]

    # The second step is judged, because the running means are 0 before the first step.
    optimizer.step()
    before = state()
    optimizer.step()
    return before, state()


def _judge(
    name: str, use: Use, before: list[list[Tensor]], after: list[list[Tensor]]
) -> list[Isolated | Check]:
    """Return, for each output of AdamW, the worst result of all parameters.

    The outputs are the new parameter, the running mean of the gradients, and the running mean of
    the squared gradients.
    """
    second = torch.tensor(2.0, dtype=torch.float64)
    largest: dict[str, Isolated] = {}
    for old, (parameter, _, mean, squares) in zip(before, after, strict=True):
        exact = adamw_step([*(x.double() for x in old), second], OPTIONS | BETAS)
        outputs = (("parameter", parameter), ("mean", mean), ("mean of squares", squares))
        for (output, got), wanted in zip(outputs, exact, strict=True):
            row, _ = elementwise(f"{name}, {output}", use, got, *wanted, ELEMENTWISE)
            if row.name not in largest or row.ratio > largest[row.name].ratio:
                largest[row.name] = row
    return [*largest.values()]
