from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from clean_transformer.model import DemoTransformer
from clean_transformer.modules.embed import Embed
from clean_transformer.modules.unembed import TiedUnembed, Unembed

from ..helpers import (
    TINY,
    assert_equal_states,
    assert_gradients,
    assert_same_function,
    random_model,
    random_tensor,
    random_tokens,
    randomized,
)


def test_equals_transformer_lens(theirs, device, dtype):
    unembed = theirs.with_weights(Unembed(theirs.cfg), "unembed").to(device, dtype)
    logits = unembed(theirs.normalized("ln_final").to(device, dtype))
    assert_same_function(logits, theirs.cache["logits"])


def test_is_the_formula():
    unembed, x = randomized(Unembed(TINY)), random_tensor(2, 5, TINY.d_model)
    expected = torch.stack([(x * column).sum(-1) for column in unembed.W_U.T], dim=-1) + unembed.b_U
    assert_same_function(unembed(x), expected)


def tied() -> tuple[Embed, TiedUnembed]:
    embed = randomized(Embed(TINY))
    return embed, randomized(TiedUnembed(TINY, embed))


def test_tied_unembedding_is_the_transposed_embedding():
    embed, unembed = tied()
    x = random_tensor(2, 5, TINY.d_model)
    assert unembed.W_U.data_ptr() == embed.W_E.data_ptr()
    assert_same_function(unembed(x), x @ embed.W_E.T + unembed.b_U)


@pytest.mark.parametrize("unembed", [Unembed(TINY), tied()[1]])
def test_hooks_are_the_input_and_the_logits(unembed):
    x = random_tensor(2, 5, TINY.d_model)
    logits, cache = unembed.double().run_with_cache(x)
    assert torch.equal(cache["in"], x)
    assert torch.equal(cache["out"], logits)


def assert_tied(model: DemoTransformer) -> None:
    assert model.unembed.W_U.data_ptr() == model.embed.W_E.data_ptr()
    assert "unembed.W_U" not in model.state_dict()
    assert sum(parameter is model.embed.W_E for parameter in model.parameters()) == 1


def test_stays_tied_through_a_training_step():
    model, tokens = random_model(), random_tokens()
    before = model.embed.W_E.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    assert_tied(model)
    # Also the rows of tokens that did not occur: their gradient comes from the unembedding.
    assert ((before != model.embed.W_E).any(dim=1)).all()


def test_a_deep_copy_is_tied_to_its_own_embedding():
    model = random_model()
    copied = deepcopy(model)
    assert_tied(copied)
    assert copied.unembed.W_U.data_ptr() != model.unembed.W_U.data_ptr()
    assert_equal_states(copied.state_dict(), model.state_dict())


@pytest.mark.parametrize("change", [torch.float32, torch.bfloat16, "meta"])
def test_stays_tied_through_a_change_of_dtype_or_device(change):
    model = random_model().to(change)
    assert model.unembed.W_U.dtype == model.embed.W_E.dtype
    assert model.unembed.W_U.device == model.embed.W_E.device
    assert_tied(model)


@pytest.mark.parametrize("assign", [False, True])
def test_stays_tied_through_loading(assign: bool):
    model, other = random_model(), random_model(seed=1)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert_tied(model)
    assert torch.equal(model.unembed.W_U, other.embed.W_E.T)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half: torch.dtype):
    unembed = randomized(Unembed(TINY), half)
    x = random_tensor(2, 5, TINY.d_model, dtype=half)
    logits, W_U, b_U = unembed(x), unembed.W_U.double(), unembed.b_U.double()
    assert logits.dtype == half
    # A sum of 13 terms: 12 additions and the final rounding, each by half a unit.
    bound = 13 * torch.finfo(half).eps / 2 * (x.double().abs() @ W_U.abs() + b_U.abs())
    assert ((logits.double() - (x.double() @ W_U + b_U)).abs() <= bound).all()


def test_gradients():
    assert_gradients(randomized(Unembed(TINY)), random_tensor(1, 2, TINY.d_model))
    assert_gradients(tied()[1], random_tensor(1, 2, TINY.d_model))
