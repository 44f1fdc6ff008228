"""Rules for the ATen operations of an optimizer step, such as AdamW and gradient clipping.

A rule returns an `Expected` (exact value and allowed error) for each output of a call.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clean_transformer.parity.limits import ELEMENTWISE, SUM
from clean_transformer.parity.operations.replay import Call64, Expected
from clean_transformer.parity.operations.rules import (
    Rule,
    approximate,
    reduced,
    rows,
    within,
)


def _lerp(call: Call64, exact: Tensor) -> Tensor:
    start, end, weight = (call.named[name] for name in ("self", "end", "weight"))
    return start.abs() + abs(weight) * (start.abs() + end.abs())


def _add_product(call: Call64, exact: Tensor) -> Tensor:
    product = call.named["tensor1"] * call.named["tensor2"] * call.named["value"]
    return call.named["self"].abs() + product.abs()


def _add_quotient(call: Call64, exact: Tensor) -> Tensor:
    quotient = call.named["tensor1"] / call.named["tensor2"] * call.named["value"]
    return call.named["self"].abs() + quotient.abs()


def _norm(call: Call64) -> list[Expected | None]:
    exact = call.run()
    return [within(SUM, call, exact, exact, reduced(call.named, exact))]


def _fused_adamw(call: Call64) -> list[Expected | None]:
    """Return the exact results of AdamW's fused step, and the allowed errors.

    AdamW is from Loshchilov and Hutter 2019. The parameters and both running means are compared.
    The gradients are not compared, because the kernel may scale them in place. With `amsgrad` or a
    gradient scaler, nothing is compared.
    """
    named = call.named
    if named["amsgrad"] or named["grad_scale"] is not None or named["found_inf"] is not None:
        return [None]
    groups = [named[key] for key in ("self", "grads", "exp_avgs", "exp_avg_sqs", "state_steps")]
    steps = [
        [within(ELEMENTWISE, call, *result) for result in adamw_step([*tensors], named)]
        for tensors in zip(*groups, strict=True)
    ]
    parameters, means, squares = ([step[i] for step in steps] for i in range(3))
    return [*parameters, *(None for _ in steps), *means, *squares]


def adamw_step(state: Sequence[Tensor], options: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Return the three results of a step of AdamW, each with its G.

    G is about the sum of the absolute values of the terms that the result adds up. The allowed
    error is proportional to G (see `parity/limits.py`).

    The results are the new parameter, the new running mean of the gradient, and the new running
    mean of the squared gradient. `state` has the old parameter, its gradient, both old running
    means, and the number of the step, counted from 1. `options` has "lr", "beta1", "beta2",
    "weight_decay", "eps" and "maximize".
    """
    parameter, gradient, mean, squares, step = state
    beta1, beta2, lr = options["beta1"], options["beta2"], options["lr"]
    gradient = -gradient if options["maximize"] else gradient
    new_mean = beta1 * mean + (1 - beta1) * gradient
    new_squares = beta2 * squares + (1 - beta2) * gradient.square()
    # Kernels may round 1 − β in the dtype. So the new terms count as if 1 − β were 1.
    mean_size = beta1 * mean.abs() + gradient.abs()
    squares_size = beta2 * squares + gradient.square()
    rate = lr / (1 - beta1**step)
    denominator = (new_squares / (1 - beta2**step)).sqrt() + options["eps"]
    update = rate * new_mean / denominator
    # A relative error ε of `new_squares` changes the square root by the relative error ε/2.
    relative = squares_size / (2 * new_squares.clamp(min=torch.finfo(torch.float64).tiny))
    update_size = rate * mean_size / denominator + update.abs() * (1 + relative)
    kept = parameter * (1 - lr * options["weight_decay"])
    return [
        (kept - update, parameter.abs() + update_size),
        (new_mean, mean_size),
        (new_squares, squares_size),
    ]


OPTIMIZER: dict[str, Rule] = {
    **rows("lerp", approximate(ELEMENTWISE, _lerp)),
    **rows("addcmul", approximate(ELEMENTWISE, _add_product)),
    **rows("addcdiv", approximate(ELEMENTWISE, _add_quotient)),
    **rows("linalg_vector_norm norm", _norm),
    **rows("_fused_adamw", _fused_adamw),
}
