"""Functions that make rules for groups of ATen operations, such as sums.

A rule is a function that gets a call, and returns an `Expected` for each of its outputs: the exact
output, the error limits and the scale G (see `parity/limits.py`).
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
    """The rule for operations that do not round: the outputs must equal the exact outputs."""
    return [Expected(torch.as_tensor(output)) for output in tree_leaves(call.run_as_given())]


def unknown(call: Call64) -> list[Expected | None]:
    """The rule for operations that are not in RULES: the scale G is |f(x)| + |f(|x|)|.

    f is the operation, and x stands for its inputs. Outputs that are not floating-point must equal
    the exact outputs.
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
    """Return an `Expected` with the limits of `kind` for sums of `terms` terms.

    `exact` is the exact output, and `scale` is its scale G. `typical` is a field of `Expected`.
    """
    healthy, wrong = kind.limits(terms, call.u)
    return Expected(exact, scale, typical, healthy, wrong, kind.dominated(terms, call.u))


def unless_integer(rule: Rule) -> Rule:
    """Return a rule that applies `rule`, or `equal` if no output is floating-point."""
    return lambda call: rule(call) if call.u else equal(call)


def approximate(kind: Kind, scale: Callable[[Call64, Tensor], Tensor]) -> Rule:
    """Return a rule for operations with one output, whose scale G is `scale(call, exact)`.

    `exact` is the exact output.
    """

    def rule(call: Call64) -> list[Expected | None]:
        exact = call.run()
        return [within(kind, call, exact, scale(call, exact))]

    return unless_integer(rule)


def summed(kind: Kind, count: Callable[[dict[str, Any], Tensor], int]) -> Rule:
    """Return a rule for operations that sum terms or products.

    `count(named, exact)` gets the named arguments and the exact output of a call, and returns the
    number of terms in each sum. The rule also runs the operation on the absolute values of its
    inputs. This gives Σ|term|, which G needs.
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
    """Return a function that returns the length of the last axis of the argument `name`."""
    return lambda named, exact: named[name].shape[-1]


def factor_length(named: dict[str, Any], exact: Tensor) -> int:
    """Return the length of the axis over which a matrix product sums."""
    return named["input" if "input" in named else "self"].shape[-1]


def reduced(named: dict[str, Any], exact: Tensor) -> int:
    """Return how many input elements are summed to each output element."""
    return named["self"].numel() // max(exact.numel(), 1)


def rows(names: str, rule: Rule) -> dict[str, Rule]:
    """Return a table with the same rule for each operation in the space-separated list `names`."""
    return dict.fromkeys(names.split(), rule)
