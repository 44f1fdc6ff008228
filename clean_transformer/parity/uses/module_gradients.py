"""Checks the gradients that the device computes for one module, such as a block."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.limits import GRADIENT
from clean_transformer.parity.oracle import ACCUMULATOR, UNIT_ROUNDOFF
from clean_transformer.parity.rounding import RandomRounding
from clean_transformer.parity.uses.backward import Flow, gradients_of
from clean_transformer.parity.uses.rows import by_rows
from clean_transformer.parity.uses.table import Use
from clean_transformer.parity.verdict import Check, Verdict

# The gradients are computed DRAWS times under random rounding (`parity/rounding.py`), more often
# in half precision. There, healthy errors are nearly as large as those of random rounding. More
# draws follow while a row does not pass, up to MOST_DRAWS in total. They are needed where a single
# rounding error causes nearly the whole error of a row. The changes of such a row are then those of
# one normal number, and a mean over few draws can be small by chance. For example, the mean square
# of 2 draws is below 1/16 of its expected value with a probability of 6%, and that of 32 draws with
# a probability of 5e-14.
DRAWS, DRAWS_IN_HALF, MOST_DRAWS = 2, 6, 32
# `check_differences` moves inputs and parameters by this fraction of their root mean square, or by
# this number if they are 0.
MOVE = 1e-5
# The largest relative error of `check_differences` that passes. Correct gradients have an error of
# about MOVE², because the module is not linear, plus 2⁻⁵³ / MOVE, because of rounding. If a
# gradient is missing, the error is much larger.
ALLOWED = 1e-6


def judge_module(
    name: str,
    use: Use,
    flow: Flow,
    gradients: Mapping[str, Tensor],
    module: nn.Module,
    dtype: torch.dtype,
    products: torch.dtype | None,
) -> list[Isolated | Check]:
    """Compare the device's gradients of a module's input and parameters with gradients in float64.

    `name` is the path of the module, such as "blocks.0". `flow` has the module's input and output
    on the device, and their gradients. `gradients` maps the full names of parameters, such as
    "blocks.0.attn.W_Q", to the device's gradients. `module` is the same module in float64. `dtype`
    is the dtype of the model on the device. `products` is the dtype in which the device multiplies
    matrices; None means `dtype`.
    """
    given, of_output = flow.given.cpu().double(), flow.of_output.cpu().double()
    exact = gradients_of(module, given, of_output)
    names = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
    titles = [f"the input of {name}", *names]
    arrived = [flow.of_given, *(gradients.get(each) for each in names)]
    got = [None if each is None else each.cpu() for each in arrived]
    u = UNIT_ROUNDOFF[products or dtype]
    rows: list[Isolated] = []
    squares = [torch.zeros_like(gradient[..., 0]) for gradient in exact]
    for draws in range(1, MOST_DRAWS + 1):
        with RandomRounding(dtype, products, seed=draws):
            drawn = gradients_of(module, given, of_output)
        for square, moved, gradient in zip(squares, drawn, exact, strict=True):
            square += (moved - gradient).square().mean(dim=-1)
        if draws < (DRAWS_IN_HALF if u > ACCUMULATOR else DRAWS):
            continue
        envelopes = _envelopes([square / draws for square in squares], exact)
        rows = [
            by_rows(f"gradient of {title}", use, ours, wanted, envelope, GRADIENT, u)[0]
            for title, ours, wanted, envelope in zip(titles, got, exact, envelopes, strict=True)
            if ours is not None
        ]
        if all(row.verdict is Verdict.PASS for row in rows):
            break
    return [check_differences(name, module, given, of_output, exact), *rows]


def _envelopes(squares: Sequence[Tensor], exact: Sequence[Tensor]) -> list[Tensor]:
    """Return the mean square change of each row under random rounding, or more.

    A row is a slice along the last axis of a gradient. `squares` has the mean square change of each
    row in the draws so far. With few draws, it can be small by chance. So the result, divided by
    the mean square of the row, is at least its median in the same gradient, and at least its median
    in all gradients.
    """
    sizes = [gradient.square().mean(dim=-1) for gradient in exact]
    relative = [(e / s).nan_to_num(0.0, 0.0) for e, s in zip(squares, sizes, strict=True)]
    of_all = torch.cat([each.flatten() for each in relative]).median()
    return [
        square.maximum(each.median().maximum(of_all) * size)
        for square, each, size in zip(squares, relative, sizes, strict=True)
    ]


def check_differences(
    name: str, module: nn.Module, given: Tensor, of_output: Tensor, exact: Sequence[Tensor]
) -> Check:
    """Compare the gradients of the float64 `module` with finite differences.

    `exact` has the gradients with respect to the input `given` and the parameters. `of_output` is
    the gradient with respect to the output. The check moves the input and all parameters in a
    random direction, and compares the change of Σ output · `of_output` with the change that `exact`
    predicts. This finds mistakes in our own code that the float64 module and the device have in
    common, such as a wrong `detach`.
    """
    values = [given, *(parameter.data for parameter in module.parameters())]
    generator = torch.Generator().manual_seed(0)
    # The input has one size per position, because sizes in the residual stream differ a lot.
    sizes = [given.square().mean(dim=-1, keepdim=True).sqrt()]
    sizes += [x.square().mean().sqrt() for x in values[1:]]
    direction = [
        torch.randn(x.shape, generator=generator, dtype=x.dtype) * size.where(size > 0, 1.0)
        for x, size in zip(values, sizes, strict=True)
    ]
    parts = [float((g * d).sum()) for g, d in zip(exact, direction, strict=True)]

    def moved(by: float) -> Tensor:
        for x, d in zip(values, direction, strict=True):
            x.add_(d, alpha=by)
        output = module(given)
        for x, d in zip(values, direction, strict=True):
            x.sub_(d, alpha=by)
        return output

    with torch.no_grad():
        change = float(((moved(MOVE) - moved(-MOVE)) * of_output).sum()) / (2 * MOVE)
    measured = abs(change - sum(parts)) / max(sum(abs(part) for part in parts), 1e-300)
    verdict = Verdict.PASS if measured <= ALLOWED else Verdict.WRONG
    return Check(f"gradients of {name} beside differences", verdict, measured, ALLOWED)
