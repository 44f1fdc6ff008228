"""Builds rules for groups of ATen operations, such as sums and elementwise functions.

A rule computes the exact outputs, the error limits and the scale G of a call (see
`expected_outputs` in `operations/bounds.py`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clean_transformer.parity.limits import (
    OTHER,
    Kind,
    Size,
    square,
    sum_scale,
    typical_size,
)
from clean_transformer.parity.operations.replay import Call64, Expected

Rule = Callable[[Call64], list[Expected | None]]


def equal(call: Call64) -> list[Expected | None]:
    """The rule for an operation that does not round: the outputs must equal the exact outputs."""
    return [Expected(torch.as_tensor(output)) for output in tree_leaves(call.run_as_given())]


def unknown(call: Call64) -> list[Expected | None]:
    """The rule for an operation f that is not in RULES: G is |f(inputs)| + |f(|inputs|)|."""
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
    """Return what is expected of one output: its limits are those of `kind` for `terms` terms."""
    healthy, wrong = kind.limits(terms, call.u)
    return Expected(exact, scale, typical, healthy, wrong, kind.dominated(terms, call.u))


def unless_integer(rule: Rule) -> Rule:
    """Return `rule`, but with the rule `equal` for calls without a floating-point output."""
    return lambda call: rule(call) if call.u else equal(call)


def approximate(kind: Kind, scale: Callable[[Call64, Tensor], Tensor]) -> Rule:
    """Return a rule for an operation with one output. `scale(call, exact output)` returns G."""

    def rule(call: Call64) -> list[Expected | None]:
        exact = call.run()
        return [within(kind, call, exact, scale(call, exact))]

    return unless_integer(rule)


def summed(kind: Kind, count: Callable[[dict[str, Any], Tensor], int]) -> Rule:
    """Return a rule for an operation that sums terms or products.

    `count(named arguments, exact output)` returns the number of terms in each sum. The rule also
    runs the operation on the absolute values of its inputs: this gives Σ|term|, which G needs.
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
    """Return a function for `summed` that counts the columns of the argument `name`."""
    return lambda named, exact: named[name].shape[-1]


def factor_length(named: dict[str, Any], exact: Tensor) -> int:
    """Return the length of the summed axis of a matrix product."""
    return named["input" if "input" in named else "self"].shape[-1]


def reduced(named: dict[str, Any], exact: Tensor) -> int:
    """Return how many elements of the input are summed to one element of the output."""
    return named["self"].numel() // max(exact.numel(), 1)


def rows(names: str, rule: Rule) -> dict[str, Rule]:
    """Return a table with the same rule for each operation in the space-separated list `names`."""
    return dict.fromkeys(names.split(), rule)
