"""Judges the gradients of a module, such as a block, against the same module in float64."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.oracle import UNIT_ROUNDOFF
from clean_transformer.parity.rounding import RandomRounding
from clean_transformer.parity.uses.backward import Flow, gradients_of
from clean_transformer.parity.uses.rows import by_rows
from clean_transformer.parity.uses.table import Use
from clean_transformer.parity.verdict import Check, Verdict

# The oracle computes the gradients DRAWS times under random rounding.
DRAWS = 2
# The oracle's gradients are compared with differences of its outputs. Inputs and parameters move by
# this fraction of their root mean square, or by this number if they are 0.
MOVE = 1e-5
# The largest relative difference that passes. The method leaves about MOVE², because the module is
# not linear, and 2⁻⁵³ / MOVE, because of rounding. A missing gradient leaves much more.
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
    """Judge the gradients of the module's input and parameters, row by row (see `by_rows`).

    `gradients` has the device's gradients by the full names of the parameters. `module` is the
    module in float64. `dtype` is the dtype on the device, and `products` that of matrix products.
    """
    given, of_output = flow.given.cpu().double(), flow.of_output.cpu().double()
    exact = gradients_of(module, given, of_output)
    envelopes = [torch.zeros_like(gradient[..., 0]) for gradient in exact]
    for seed in range(DRAWS):
        with RandomRounding(dtype, products, seed):
            drawn = gradients_of(module, given, of_output)
        for envelope, moved, gradient in zip(envelopes, drawn, exact, strict=True):
            envelope += (moved - gradient).square().mean(dim=-1) / DRAWS
    # With few draws, the envelope of a row can be small by chance. So the relative envelope of each
    # row is at least the median of its tensor, and at least the median of all rows.
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
    u = UNIT_ROUNDOFF[products or dtype]
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
    """Compare the gradients `exact` of a float64 module with differences of its outputs.

    The input and all parameters move together in a random direction. The change of the output then
    follows from the gradients. So the check finds a gradient that our code cuts or changes, which
    the oracle would have in common with the device.
    """
    values = [given, *(parameter.data for parameter in module.parameters())]
    generator = torch.Generator().manual_seed(0)
    # The rows of the residual stream can have very different sizes.
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
