"""Functions that make rules for groups of ATen operations, such as sums.

A rule returns an `Expected` (exact value and allowed error) for each output of a call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clean_transformer.parity.limits import OTHER, Kind
from clean_transformer.parity.operations.replay import Call64, Expected
from clean_transformer.parity.scales import Size, square, sum_scale, typical_size

Rule = Callable[[Call64], list[Expected | None]]


def equal(call: Call64) -> list[Expected | None]:
    """The rule for operations that do not round: the outputs must equal the exact outputs."""
    return [Expected(torch.as_tensor(output)) for output in tree_leaves(call.run_as_given())]


def unknown(call: Call64) -> list[Expected | None]:
    """The rule for operations that have no rule of their own.

    The allowed error is proportional to |f(x)| + |f(|x|)|, where f is the operation, and x stands
    for its inputs. Outputs that are not floating-point must equal the exact outputs.
    """
    pairs = zip(tree_leaves(call.run()), tree_leaves(call.run(abs)), strict=True)
    return [
        within(OTHER, call, exact, exact.abs() + size.abs())
        if isinstance(exact, Tensor) and exact.is_floating_point()
        else Expected(torch.as_tensor(exact))
        for exact, size in pairs
    ]


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


def reduced(named: dict[str, Any], exact: Tensor) -> int:
    """Return how many elements of the input are summed into one element of the output."""
    return named["self"].numel() // max(exact.numel(), 1)


def rows(names: str, rule: Rule) -> dict[str, Rule]:
    """Return a table with the same rule for each operation in the space-separated list `names`."""
    return dict.fromkeys(names.split(), rule)
