"""Beams against every continuation there is; `test_generate.py` has them against transformers."""

from itertools import product

import pytest
import torch

from clean_transformer.model import DemoTransformer
from clean_transformer.text.beam_search import Search, search_beams
from clean_transformer.text.decoding import Stop
from clean_transformer.text.settings import Sampling

from ..helpers import random_model, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

CFG = tiny(d_vocab=5)
LONGEST = 3


@torch.no_grad()
def likeliest(model: DemoTransformer, prompt: list[int], stop: list[int]) -> list[int]:
    """Of all the continuations, the one with the highest mean log-probability."""
    everything = torch.tensor([[*new] for new in product(range(CFG.d_vocab), repeat=LONGEST)])
    tokens = torch.cat([torch.tensor([prompt]).expand(len(everything), -1), everything], dim=1)
    log_probs = model(tokens)[:, len(prompt) - 1 : -1].log_softmax(-1)
    means = log_probs.gather(-1, everything[..., None])[..., 0].cumsum(1) / (torch.arange(3) + 1)
    whole = {}
    for new, mean in zip(everything.tolist(), means.tolist(), strict=True):
        ends = [place for place, token in enumerate(new) if token in stop]
        last = ends[0] if ends else LONGEST - 1
        whole[tuple(new[: last + 1])] = mean[last]
    return [*max(whole, key=lambda new: whole[new])]


@pytest.mark.parametrize("stop", [[], [2], [0, 3]])
def test_as_many_beams_as_continuations_find_the_likeliest(stop: list[int]):
    model = random_model(CFG, seed=7)
    with torch.no_grad():
        model.embed.W_E *= 2
        model.ln_final.b.zero_()  # which alone would make one token the likeliest everywhere
    prompts = [[0, 4], [3], [4, 4, 1, 2]]
    found = search_beams(model, prompts, LONGEST, CFG.d_vocab**2, Sampling(), Stop(stop))
    assert found == [likeliest(model, prompt, stop) for prompt in prompts]
    assert found != search_beams(model, prompts, LONGEST, 1, Sampling(), Stop(stop))


def test_beams_go_on_however_many_stop():
    search = Search([0], LONGEST, 2, Stop([0, 1, 2, 3]))
    parents = search.advance(torch.tensor([[-1.0, -3.0, -4.0, -6.0, -2.0, -5.0]]))
    assert parents == [0, 0]
    assert [beam.new for beam in search.running] == [[4], [5]]
    # The third best is no candidate for the end: only two beams are followed.
    assert [beam.new for beam in search.ended] == [[0]]


def test_penalties_act_on_log_probabilities():
    model = random_model(CFG)
    [[free]] = search_beams(model, [[1]], 1, 2, Sampling(), Stop())
    [[other]] = search_beams(model, [[1, free]], 1, 2, Sampling(repetition_penalty=50.0), Stop())
    # Every log-probability is negative, so that the penalty multiplies it.
    assert other not in (1, free)
