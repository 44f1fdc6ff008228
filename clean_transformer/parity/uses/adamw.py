"""Judges a step of AdamW against its formula in float64."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from clean_transformer.parity.limits import ELEMENTWISE
from clean_transformer.parity.operations.optimizer import adamw_step
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.uses.rows import elementwise
from clean_transformer.parity.uses.table import Use
from clean_transformer.parity.verdict import Check, Verdict

# AdamW updates every number independently. So only parameters with at most this many numbers are
# judged, to save time.
LARGEST = 2**18
OPTIONS: dict[str, Any] = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
BETAS = {"beta1": 0.9, "beta2": 0.999}
FORMS: dict[str, dict[str, bool]] = {"AdamW": {}, "fused AdamW": {"fused": True}}


def judge_adamw(
    use: Use, parameters: list[tuple[Tensor, Tensor]]
) -> Iterator[tuple[list[Any], Callable[[], Any]]]:
    """Judge a step of each form of AdamW. `parameters` has pairs (parameter, gradient).

    Yields for each form the rows, and a function that takes a step again.
    """
    small = [pair for pair in parameters if pair[0].numel() <= LARGEST]
    for name, form in FORMS.items() if small else ():
        try:
            step = partial(_two_steps, small, form)
            before, after = step()
        except RuntimeError as error:  # for example, the device has no fused kernel
            note = str(error).partition("\n")[0]
            yield [Check(name, Verdict.NOT_CHECKED, 0.0, note=note)], lambda: None
            continue
        with trusted():
            yield _judge(name, use, before, after), step


def _two_steps(
    parameters: list[tuple[Tensor, Tensor]], form: dict[str, bool]
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Take two steps, so that the running means are not 0 before the second step.

    Returns, for each parameter, the parameter, its gradient and its running means [mean, squares]
    before and after the second step.
    """
    given = [parameter.detach().clone().requires_grad_() for parameter, _ in parameters]
    optimizer = AdamW(given, betas=(BETAS["beta1"], BETAS["beta2"]), **OPTIONS, **form)
    for each, (_, gradient) in zip(given, parameters, strict=True):
        each.grad = gradient.clone()

    def state() -> list[list[Tensor]]:
        return [
            [x.detach().cpu().clone() for x in (each, each.grad, s["exp_avg"], s["exp_avg_sq"])]
            for each, s in optimizer.state.items()
        ]

    optimizer.step()
    before = state()
    optimizer.step()
    return before, state()


def _judge(name: str, use: Use, before: list[list[Tensor]], after: list[list[Tensor]]) -> list[Any]:
    second = torch.tensor(2.0, dtype=torch.float64)
    rows = []
    for old, (parameter, _, mean, squares) in zip(before, after, strict=True):
        exact = adamw_step(*(x.double() for x in old), second, OPTIONS | BETAS)
        for what, got, wanted in zip(
            ("parameter", "running mean", "running mean of squares"),
            (parameter, mean, squares),
            exact,
            strict=True,
        ):
            rows.append(elementwise(f"{name}, {what}", use, got, *wanted, ELEMENTWISE)[0])
    # One row for each output is enough for the report: the row with the largest ratio.
    worst = {row.name: row for row in sorted(rows, key=lambda row: row.ratio)}
    return [*worst.values()]
