"""A device fault that strikes only some calls of an operation, at random."""

import random

from clean_transformer.parity.faults.corruptions import DeviceFault, own, shifted, with_result
from clean_transformer.parity.operations.call import Call


class Seldom:
    """The condition of a fault that strikes a call with the given probability.

    `calls` counts the calls of the fault's operations, and `strikes` counts the calls that it has
    struck. `seed` seeds the random numbers.
    """

    def __init__(self, probability: float, seed: int):
        self.probability, self.draw = probability, random.Random(seed)
        self.calls = self.strikes = 0

    def __call__(self, call: Call) -> bool:
        """Whether the fault strikes this call."""
        is_struck = self.draw.random() < self.probability
        self.calls += 1
        self.strikes += is_struck
        return is_struck


def seldom(probability: float, seed: int) -> tuple[DeviceFault, Seldom]:
    """Return a fault of `addmm` that shifts the columns of a result, and its condition."""
    condition = Seldom(probability, seed)
    name = f"addmm-{probability:.4g}-of-calls"
    description = f"addmm has its columns shifted in {probability:.2%} of its calls"
    return own(name, description, "addmm", condition, with_result(shifted)), condition
