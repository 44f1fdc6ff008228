"""Each sampler against its formula, against transformers', and by what it draws."""

import math
import re
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clean_transformer.text.sampling import (
    choose,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    new_generator,
    penalize,
    penalize_frequency,
    penalize_repetition,
    sample,
)
from clean_transformer.text.settings import Sampling

from ..helpers import assert_drawn_from, unchecked_types

# softmax: 0.5, 0.25, 0.125, 0.125
LOGITS = torch.tensor([[3.0, 2.0, 1.0, 1.0]]) * math.log(2)


def kept(logits: Tensor) -> list[int]:
    return logits.isfinite().nonzero()[:, 1].tolist()


@pytest.mark.parametrize(
    ("keep", "ids"),
    [
        (partial(keep_top_k, k=1), [0]),
        (partial(keep_top_k, k=2), [0, 1]),
        (partial(keep_top_k, k=3), [0, 1, 2, 3]),  # the fourth is as likely
        (partial(keep_top_k, k=9), [0, 1, 2, 3]),
        (partial(keep_top_p, p=1e-9), [0]),
        (partial(keep_top_p, p=0.49), [0]),
        (partial(keep_top_p, p=0.51), [0, 1]),
        (partial(keep_top_p, p=1.0), [0, 1, 2, 3]),
        (partial(keep_min_p, p=0.0), [0, 1, 2, 3]),
        (partial(keep_min_p, p=0.24), [0, 1, 2, 3]),
        (partial(keep_min_p, p=0.49), [0, 1]),
        (partial(keep_min_p, p=0.51), [0]),
        (partial(keep_min_p, p=1.0), [0]),
    ],
)
def test_what_is_kept(keep, ids: list[int]):
    given_logits = LOGITS.clone()
    assert kept(keep(given_logits)) == ids
    assert torch.equal(keep(given_logits)[:, ids], LOGITS[:, ids])
    assert torch.equal(given_logits, LOGITS)


def test_the_fewest_that_reach_p():
    assert len(kept(keep_top_p(torch.zeros(1, 2), p=0.5))) == 1


def test_repetition_counts_once_and_frequency_every_time():
    logits = torch.tensor([[4.0, -4.0, 4.0, 0.0], [4.0, -4.0, 4.0, 0.0]])
    before = logits.clone()
    previous = [[0, 1, 0, 0], []]
    repetition = penalize_repetition(logits, previous, 2.0)
    assert repetition.tolist() == [[2.0, -8.0, 4.0, 0.0], [4.0, -4.0, 4.0, 0.0]]
    frequency = penalize_frequency(logits, previous, 0.5)
    assert frequency.tolist() == [[2.5, -4.5, 4.0, 0.0], [4.0, -4.0, 4.0, 0.0]]
    assert torch.equal(logits, before)


@given(
    seed=st.integers(0, 2**32),
    k=st.integers(1, 12),
    p=st.floats(0.01, 1),
    penalty=st.floats(0.1, 3),
    previous=st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3), min_size=2, max_size=2),
)
def test_the_same_as_transformers(seed, k, p, penalty, previous):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(seed)) * 3
    ids = torch.tensor(previous)
    for ours, theirs in [
        (keep_top_k(logits, k), process.TopKLogitsWarper(k)),
        (keep_top_p(logits, p), process.TopPLogitsWarper(p)),
        (keep_min_p(logits, p), process.MinPLogitsWarper(p)),
        (
            penalize_repetition(logits, previous, penalty),
            process.RepetitionPenaltyLogitsProcessor(penalty),
        ),
    ]:
        assert torch.equal(ours, theirs(ids, logits.clone()))


def test_draws_follow_the_softmax():
    generator = torch.Generator().manual_seed(0)
    assert_drawn_from(sample(LOGITS.expand(20_000, -1), generator), LOGITS[0].double().softmax(-1))


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"temperature": 1.0}, [8, 4, 2, 2]),
        ({"temperature": 0.5}, [64, 16, 4, 4]),
        ({"temperature": 1.0, "top_k": 2}, [2, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.7}, [2, 1, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.4}, [2, 1, 0, 0]),
        # The temperature comes first: at 1 the nucleus of 0.7 would be two tokens.
        ({"temperature": 0.5, "top_p": 0.7}, [1, 0, 0, 0]),
        # Then top-k, before top-p: of those two alone, the first has 0.6 by itself.
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
        # Then top-p, before min-p, which would have left two as well.
        ({"temperature": 1.0, "top_p": 0.6, "min_p": 0.4}, [2, 1, 0, 0]),
    ],
)
def test_draws_follow_the_settings(settings: dict, weights: list[float]):
    sampling = Sampling(seed=1, **settings)
    drawn = choose(LOGITS.expand(20_000, -1), sampling, new_generator(1))
    expected = torch.tensor(weights, dtype=torch.float64)
    assert_drawn_from(drawn, expected / expected.sum())


def test_the_likeliest_is_taken_unless_a_temperature_is_given():
    assert choose(LOGITS.flip(1), Sampling(), None).tolist() == [3]


def test_penalties_see_what_they_should():
    logits = torch.tensor([[4.0, 4.0, 4.0]])
    repetition, frequency = Sampling(repetition_penalty=2.0), Sampling(frequency_penalty=0.5)
    assert penalize(logits, [[0]], [[1, 1]], repetition).tolist() == [[2.0, 2.0, 4.0]]
    assert penalize(logits, [[0]], [[1, 1]], frequency).tolist() == [[4.0, 3.0, 4.0]]


def test_a_seed_means_the_same_draws_and_none_the_global_ones():
    logits = torch.zeros(1000, 50)
    seeded = Sampling(temperature=1.0, seed=3)
    drawn = choose(logits, seeded, new_generator(3))
    assert torch.equal(drawn, choose(logits, seeded, new_generator(3)))
    torch.manual_seed(3)
    assert torch.equal(drawn, choose(logits, Sampling(temperature=1.0), None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "Sampling.temperature is -1.0; it must be 0 or a positive number"),
        ({"temperature": "0"}, "Sampling.temperature is '0'; it must be 0 or a positive number"),
        ({"temperature": math.nan}, "Sampling.temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "Sampling.top_k is 0; it must be a positive integer"),
        (
            {"temperature": 1.0, "top_p": 0.0},
            "Sampling.top_p is 0.0; it must be above 0 and",
        ),
        ({"temperature": 1.0, "top_p": 90.0}, "Sampling.top_p is 90.0"),
        ({"temperature": 1.0, "min_p": -0.1}, "Sampling.min_p is -0.1; it must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "Sampling.repetition_penalty is 0.0; it must be from 0.01"),
        ({"repetition_penalty": 1e-300}, "must be from 0.01 to 100"),
        ({"frequency_penalty": math.inf}, "Sampling.frequency_penalty is inf; it must be a finite"),
        ({"top_k": 5}, "Sampling.top_k is 5; it must be None at temperature 0, which takes the"),
        ({"top_p": 0.5}, "Sampling.top_p is 0.5; it must be None at temperature 0"),
        ({"min_p": 0.5}, "Sampling.min_p is 0.5; it must be None at temperature 0"),
    ],
)
def test_settings_without_a_meaning(settings: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)), unchecked_types():
        Sampling(**settings)
