"""Checks the gradients that the device computes for one module, such as a block."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.oracle import ACCUMULATOR, UNIT_ROUNDOFF
from clean_transformer.parity.rounding import RandomRounding
from clean_transformer.parity.uses.backward import Flow, gradients_of
from clean_transformer.parity.uses.rows import by_rows
from clean_transformer.parity.uses.table import Use
from clean_transformer.parity.verdict import Check, Verdict

# The gradients are computed DRAWS times under random rounding (`parity/rounding.py`), more often
# in half precision. There, healthy errors are nearly as large as those of random rounding.
DRAWS, DRAWS_IN_HALF = 2, 6
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
    envelopes = [torch.zeros_like(gradient[..., 0]) for gradient in exact]
    u = UNIT_ROUNDOFF[products or dtype]
    draws = DRAWS_IN_HALF if u > ACCUMULATOR else DRAWS
    for seed in range(draws):
        with RandomRounding(dtype, products, seed):
            drawn = gradients_of(module, given, of_output)
        for envelope, moved, gradient in zip(envelopes, drawn, exact, strict=True):
            envelope += (moved - gradient).square().mean(dim=-1) / draws
    # An envelope is the mean square change that random rounding causes in one row (a slice along
    # the last axis). With few draws, an envelope can be small by chance. So envelope / mean square
    # of the row is at least its median in the same tensor, and at least its median in all tensors.
    sizes = [gradient.square().mean(dim=-1) for gradient in exact]
    relative = [(e / s).nan_to_num(0.0, 0.0) for e, s in zip(envelopes, sizes, strict=True)]
    of_all = torch.cat([each.flatten() for each in relative]).median()
    envelopes = [
        e.maximum(each.median().maximum(of_all) * s)
        for e, each, s in zip(envelopes, relative, sizes, strict=True)
    ]
    names = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
    titles = [f"the input of {name}", *names]
    got = [flow.of_given, *(gradients.get(each) for each in names)]
    return [
        check_differences(name, module, given, of_output, exact),
        *(
            by_rows(f"gradient of {title}", use, ours.cpu(), wanted, envelope, u)[0]
            for title, ours, wanted, envelope in zip(titles, got, exact, envelopes, strict=True)
            if ours is not None
        ),
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
