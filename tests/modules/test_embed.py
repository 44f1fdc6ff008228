import pytest
import torch
import torch.nn.functional as F

from clean_transformer.modules.embed import Embed

from ..helpers import TINY, assert_gradients, assert_same_function, random_tokens, randomized


def test_equals_transformer_lens(theirs, device, dtype):
    embed = theirs.with_weights(Embed(theirs.cfg), "embed").to(device, dtype)
    assert_same_function(embed(theirs.tokens.to(device)), theirs.cache["hook_embed"])


@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_multiplies_one_hot_tokens_with_the_embedding(integers: torch.dtype):
    embed, tokens = randomized(Embed(TINY)), random_tokens()
    one_hot = F.one_hot(tokens, TINY.d_vocab).double()
    assert torch.equal(embed(tokens.to(integers)), one_hot @ embed.W_E)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_copies_the_bits(half: torch.dtype):
    embed, tokens = randomized(Embed(TINY), half), random_tokens()
    assert torch.equal(embed(tokens), embed.W_E[tokens])


def test_gradients():
    assert_gradients(randomized(Embed(TINY)), random_tokens())


def test_starts_with_the_published_spread():
    # Of n draws the deviation is known to σ/√(2n): 5 of these are too many once in 2 million.
    weight = Embed(TINY).W_E.detach()
    assert weight.std() == pytest.approx(0.02, rel=5 / (2 * weight.numel()) ** 0.5)
