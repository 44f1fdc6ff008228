"""The components of the residual stream add up to it; TransformerLens's values are in
`test_transformer_lens_calls.py`."""

import numpy as np
import pytest
import torch

from .helpers import TINY, assert_same_function, random_model, random_tokens, unchecked_types

TOKENS = random_tokens()


@pytest.fixture(scope="module")
def model():
    return random_model().requires_grad_(False)


@pytest.fixture(scope="module")
def cache(model):
    return model.run_with_cache(TOKENS)[1]


@pytest.mark.parametrize("layer", [1, torch.tensor(1), np.int64(1), -1, None])
def test_components_add_up_to_the_residual_stream(cache, layer):
    whole = cache["resid_post", -1] if layer in (-1, None) else cache["resid_pre", 1]
    assert_same_function(cache.decompose_resid(layer).sum(0), whole)
    parts = cache.get_full_resid_decomposition(layer, expand_neurons=False)
    assert_same_function(parts.sum(0), whole)
    rest = cache.stack_head_results(-1 if layer is None else layer, incl_remainder=True)
    assert_same_function(rest.sum(0), whole)


def test_with_the_attention_of_the_layer_they_are_the_input_of_its_mlp(cache):
    for parts in (
        cache.decompose_resid(1, mlp_input=True),
        cache.get_full_resid_decomposition(1, mlp_input=True, expand_neurons=False),
    ):
        assert_same_function(parts.sum(0), cache["resid_mid", 1])


def test_normalized_components_add_up_to_what_the_layer_norm_gives(cache):
    for layer, mlp_input, place in ((None, False, "ln_final"), (1, True, "blocks.1.ln2")):
        parts = cache.decompose_resid(layer, mlp_input=mlp_input, apply_ln=True)
        assert_same_function(parts.sum(0), cache[f"{place}.hook_normalized"])


def test_the_logit_lens_ends_with_the_logits(model, cache):
    normalized = cache.accumulated_resid(apply_ln=True)
    assert_same_function(model.unembed(normalized[-1]), model(TOKENS))


def test_before_the_first_layer_there_are_no_heads(cache):
    assert cache.stack_head_results(0).shape == (0, *TOKENS.shape, TINY.d_model)


@pytest.mark.parametrize("positions", [-1, (1, 3), (0, 5, 2), [0, 2], np.array([1, 2])])
def test_positions_may_be_chosen_before_or_after(cache, positions):
    where = slice(*positions) if isinstance(positions, tuple) else positions
    heads = cache.stack_head_results(pos_slice=positions)
    assert_same_function(heads, cache.stack_head_results()[:, :, where])


def test_what_does_not_fit_is_refused(cache):
    with pytest.raises(ValueError, match="layer is 3; it must be -1 or from 0 to 2"):
        cache.decompose_resid(3)
    with pytest.raises(ValueError, match=r"tokens have shape \[2\] and incorrect_tokens \[1\]"):
        cache.logit_attrs(cache.decompose_resid(), torch.ones(2).long(), torch.ones(1).long())
    with pytest.raises(AttributeError, match="'compute_head_results': stack_head_results"):
        cache.compute_head_results()
    with pytest.raises(KeyError, match="hook_z"):
        type(cache)({"hook_embed": cache["embed"]}, cache.model)["blocks.0.attn.hook_z"]


@pytest.mark.parametrize(
    "method", ["accumulated_resid", "decompose_resid", "get_full_resid_decomposition"]
)
def test_the_input_of_an_mlp_needs_a_layer(cache, method):
    for layer in ({}, {"layer": -1}, {"layer": TINY.n_layers}):
        with pytest.raises(ValueError, match="mlp_input=True needs a layer from 0 to 1"):
            getattr(cache, method)(**layer, mlp_input=True)
    with pytest.raises(ValueError, match="mlp_input=True needs a layer from 0 to 1"):
        cache.apply_ln_to_stack(cache.decompose_resid(), mlp_input=True)


def test_an_unknown_mode_is_refused(cache):
    with unchecked_types(), pytest.raises(ValueError, match="mode is 'heads'; it must be 'all'"):
        cache.decompose_resid(mode="heads")


def test_tokens_of_a_stack_are_never_read_across_its_axes(model):
    tokens = random_tokens(batch=2, length=2)
    cache = model.run_with_cache(tokens)[1]
    stack = cache.decompose_resid()
    with pytest.raises(ValueError, match=r"tokens have shape \[2\]; .* tokens of \[2, 2\]"):
        cache.logit_attrs(stack, torch.tensor([5, 9]))
    every = cache.logit_attrs(stack, torch.tensor([[5, 5], [9, 9]]))
    assert_same_function(every[:, 0], cache.logit_attrs(stack, 5)[:, 0])
    assert_same_function(every[:, 1], cache.logit_attrs(stack, 9)[:, 1])
    # A stack of one position, with and without its axis.
    for where in ([-1], -1):
        last = cache.decompose_resid(pos_slice=where)
        found = cache.logit_attrs(last, torch.tensor([5, 9]), pos_slice=where)
        assert_same_function(found.flatten(1), every[:, :, -1])
