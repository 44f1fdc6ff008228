import pytest
import torch

from clean_transformer.modules.pos_embed import PosEmbed

from ..helpers import TINY, assert_gradients, assert_same_function, random_tokens, randomized


def test_equals_transformer_lens(theirs, device, dtype):
    pos_embed = theirs.with_weights(PosEmbed(theirs.cfg), "pos_embed").to(device, dtype)
    ours = pos_embed(theirs.tokens.to(device))
    assert_same_function(ours, theirs.cache["hook_pos_embed"].expand_as(ours))


def test_gives_every_input_the_rows_from_the_first_on():
    pos_embed, tokens = randomized(PosEmbed(TINY)), random_tokens(batch=3, length=7)
    rows = [pos_embed.W_pos[position] for position in range(7)]
    assert torch.equal(pos_embed(tokens), torch.stack([torch.stack(rows)] * 3))


def test_gives_the_rows_of_positions_that_are_named():
    pos_embed = randomized(PosEmbed(TINY))
    positions = torch.tensor([[0, 0, 1], [4, 5, 6]])
    for row, named in zip(pos_embed(positions, positions), positions.tolist(), strict=True):
        assert torch.equal(row, torch.stack([pos_embed.W_pos[place] for place in named]))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_copies_the_bits(half: torch.dtype):
    pos_embed = randomized(PosEmbed(TINY), half)
    assert torch.equal(pos_embed(random_tokens(batch=1, length=10))[0], pos_embed.W_pos)


def test_gradients():
    assert_gradients(randomized(PosEmbed(TINY)), random_tokens())
