"""Functions that make rules for groups of ATen operations, such as sums.

A rule returns an `Expected` (exact value and allowed error) for each output of a call, or None
instead of a list for a call that cannot be checked.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clean_transformer.parity.limits import OTHER, Kind
from clean_transformer.parity.operations.replay import Call64, Expected
from clean_transformer.parity.scales import Size, square, sum_scale, typical_size

Rule = Callable[[Call64], list[Expected | None] | None]

# How often the inputs of an operation without a rule are changed by random roundings.
DRAWS = 4
# The smallest relative change of these inputs. A smaller change would be lost in the rounding
# errors of float64.
SMALLEST_STEP = 2.0**-40


def equal(call: Call64) -> list[Expected | None]:
    """The rule for operations that do not round: the outputs must equal the exact outputs."""
    return [Expected(torch.as_tensor(output)) for output in tree_leaves(call.run_as_given())]


def unknown(call: Call64) -> list[Expected | None]:
    """The rule for operations that have no rule of their own.

    G is |f(x)| + |f(|x|)| + |f(x (1 ± u)) − f(x)| / u, where f is the operation, x stands for its
    inputs, and u is the unit roundoff. But f may round numbers that none of these terms shows. So
    an error above the limit does not prove a fault, and the call is NOT CHECKED.
    """
    outputs = zip(smooth(call), tree_leaves(call.run(abs)), strict=True)
    return [
        expected
        and replace(
            expected,
            scale=None if expected.scale is None else expected.scale + _finite(size.abs()),
            proves=False,
        )
        for expected, size in outputs
    ]


def smooth(call: Call64) -> list[Expected | None]:
    """The rule for smooth functions of one number, such as sin(x).

    G is |f(x)| + |f(x (1 ± u)) − f(x)| / u, where u is the unit roundoff: a kernel may round x and
    f(x). Outputs that are not floating-point must equal the exact outputs.
    """
    step = max(call.u, SMALLEST_STEP)
    moved = [tree_leaves(call.run(_rounding(step, seed))) for seed in range(DRAWS)]

    def expect(exact: Any, *others: Any) -> Expected | None:
        if not isinstance(exact, Tensor) or not exact.is_floating_point():
            return None if exact is None else Expected(torch.as_tensor(exact))
        change = torch.stack([(other - exact).abs() for other in others]).amax(0)
        return within(OTHER, call, exact, exact.abs() + _finite(change) / step)

    return [*map(expect, tree_leaves(call.run()), *moved)]


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)


def _rounding(step: float, seed: int) -> Callable[[Any], Any]:
    """Return a function that multiplies every element of a tensor by 1 + step or 1 − step."""
    generator = torch.Generator().manual_seed(seed)

    def change(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x * (1 + step * (torch.randint(2, x.shape, generator=generator) * 2 - 1))

    return change


def within(
    kind: Kind,
    call: Call64,
    exact: Tensor,
    scale: Tensor,
    terms: int = 1,
    typical: Callable[[], Tensor] | None = None,
) -> Expected:
    """Return an `Expected` with the error limits of `kind` for sums of `terms` terms.

    `exact` is the exact output, and the allowed error is proportional to `scale`. `typical()`
    returns the typical rounding error of each element, divided by the unit roundoff.
    """
    healthy, wrong = kind.limits(terms, call.u)
    return Expected(exact, scale, typical, healthy, wrong, kind.dominated(terms, call.u))


def unless_integer(rule: Rule) -> Rule:
    """Return a rule: `rule` for floating-point outputs, and exact equality for other outputs."""
    return lambda call: rule(call) if call.u else equal(call)


def approximate(kind: Kind, scale: Callable[[Call64, Tensor], Tensor]) -> Rule:
    """Return a rule for operations with one output.

    The allowed error is proportional to `scale(call, exact)`, where `exact` is the exact output.
    """

    def rule(call: Call64) -> list[Expected | None]:
        exact = call.run()
        return [within(kind, call, exact, scale(call, exact))]

    return unless_integer(rule)


def summed(kind: Kind, count: Callable[[dict[str, Any], Tensor], int]) -> Rule:
    """Return a rule for operations that sum terms or products.

    `count(named, exact)` returns the number of terms in each sum. `named` has the call's arguments
    by name, and `exact` is the exact output.
    """

    def rule(call: Call64) -> list[Expected | None]:
        exact = call.run()
        n_terms = count(call.named, exact)
        # The terms of a mean are x / n. Their squares are x² / n². But the mean of x² divides by n
        # only once, so `terms` divides by n again.
        divided = n_terms if call.name == "mean" else 1

        def terms(size: Size) -> Tensor:
            return call.run(size) / (divided if size is square else 1)

        def typical() -> Tensor:
            return typical_size(exact, terms(square))

        scale = sum_scale(exact, terms, call.u)
        return [within(kind, call, exact, scale, n_terms, typical)]

    return unless_integer(rule)


def length(name: str) -> Callable[[dict[str, Any], Tensor], int]:
    """Return a function that returns the length of the last axis of the argument called `name`."""
    return lambda named, exact: named[name].shape[-1]


def factor_length(named: dict[str, Any], exact: Tensor) -> int:
    """Return the length of the axis over which a matrix product sums."""
    return named["input" if "input" in named else "self"].shape[-1]


def convolution_terms(named: dict[str, Any], exact: Tensor) -> int:
    """Return how many products a convolution sums into one element of its output."""
    weight = named["weight"]  # [out in …]; [in out …] for a transposed convolution
    channels = weight.shape[0] // named["groups"] if named["transposed"] else weight.shape[1]
    return channels * math.prod(weight.shape[2:])


def reduced(named: dict[str, Any], exact: Tensor) -> int:
    """Return how many elements of the input are summed into one element of the output."""
    return named["self"].numel() // max(exact.numel(), 1)


def rows(names: str, rule: Rule) -> dict[str, Rule]:
    """Return a table with the same rule for each operation in the space-separated list `names`."""
    return dict.fromkeys(names.split(), rule)
