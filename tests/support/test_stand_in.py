"""Stand-ins nest, each can be taken away at any time, and nothing is left behind."""

from copy import deepcopy
from functools import partial
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from clean_transformer.support.stand_in import Method, StandIn


class Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def then_add(amount: float, below: Method, x: Tensor) -> Tensor:
    return below(x) + amount


def adding(amount: float) -> partial[Method]:
    return partial(partial, then_add, amount)


ONE = torch.ones(1)


def test_they_nest_in_the_order_they_were_put():
    module = Times(3)
    with StandIn(module, "forward", adding(1)):
        with StandIn(module, "forward", lambda below: lambda x: 10 * below(x)):
            assert module(ONE) == 40
        assert module(ONE) == 4
    assert module(ONE) == 3


@pytest.mark.parametrize("order", [*permutations(range(3))])
def test_each_can_be_taken_away_at_any_time(order: tuple[int, ...]):
    module = Times(3)
    before = {*vars(module)}
    put = [StandIn(module, "forward", adding(10**digit)) for digit in range(3)]
    expected = 3 + 111
    for digit in order:
        put[digit].restore()
        put[digit].restore()
        expected -= 10**digit
        assert module(ONE) == expected
    assert {*vars(module)} == before


def test_what_was_on_the_instance_before_is_there_again():
    module = Times(3)
    own = module.forward = partial(Times.forward, Times(5))
    stand_in = StandIn(module, "forward", adding(1))
    assert module(ONE) == 6
    stand_in.restore()
    assert module.forward is own


def test_what_somebody_else_puts_meanwhile_stays():
    module = Times(3)
    stand_in = StandIn(module, "forward", adding(1))
    theirs = module.forward = partial(Times.forward, Times(5))
    stand_in.restore()
    assert module.forward is theirs
    with StandIn(module, "forward", adding(1)):
        assert module(ONE) == 6
    assert module.forward is theirs


def test_a_copy_has_its_own():
    module = Times(3)
    stand_in = StandIn(module, "forward", adding(1))
    copy = deepcopy(module)
    stand_in.restore()
    copy.factor = 7
    assert module(ONE) == 3
    assert copy(ONE) == 8


@pytest.mark.parametrize("amounts", [(), (1,), (1, 10)])
@pytest.mark.parametrize("assigned", [False, True])
def test_nothing_stays_of_one_that_cannot_be_made(amounts: tuple[int, ...], assigned: bool):
    def fail(below: Method) -> Method:
        raise RuntimeError("no such kernel")

    module = Times(3)
    if assigned:
        module.forward = partial(Times.forward, module)
    before = {**vars(module)}
    put = [StandIn(module, "forward", adding(amount)) for amount in amounts]
    with pytest.raises(RuntimeError, match="no such kernel"):
        StandIn(module, "forward", fail)
    assert module(ONE) == 3 + sum(amounts)
    with StandIn(module, "forward", adding(100)):
        assert module(ONE) == 103 + sum(amounts)
    for stand_in in put:
        stand_in.restore()
    assert vars(module) == before
