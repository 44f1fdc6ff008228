"""Texts wherever token ids go, losses, and what the model refuses to be called with."""

from copy import deepcopy

import pytest
import torch

from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache, StaticKVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.text.tokenizer import Tokenizer
from clean_transformer.weights.processing import process_weights

from ..helpers import (
    TINY,
    assert_same_function,
    random_model,
    random_tokens,
    reading_model,
    unchecked_types,
)

TEXTS = ["the cat sat", "the mat"]


@pytest.fixture(scope="module")
def model() -> DemoTransformer:
    return reading_model().double().requires_grad_(False)


def test_each_text_of_a_padded_batch_has_the_loss_that_it_has_alone(model):
    for side in ("left", "right", None):
        losses = model(TEXTS, return_type="loss", loss_per_token=True, padding_side=side)
        for row, text in zip(losses, TEXTS, strict=True):
            alone = model(text, return_type="loss", loss_per_token=True)[0]
            assert_same_function(row[row != 0], alone)
        mean = model(tuple(TEXTS), return_type="loss", padding_side=side)
        assert_same_function(mean, losses.sum() / (losses != 0).sum())


def test_the_loss_of_one_text_is_the_mean_of_its_negative_log_probabilities(model):
    tokens = model.to_tokens("the cat sat")
    logits, loss = model(tokens, return_type="both")
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    assert_same_function(loss, expected)
    assert torch.equal(logits, model(tokens))


def test_stopping_at_a_layer_gives_the_residual_stream_before_it(model):
    tokens = model.to_tokens("the cat sat")
    _, cache = model.run_with_cache(tokens)
    for layer in (0, 1, -1):
        assert_same_function(model(tokens, stop_at_layer=layer), cache["resid_pre", layer])
    assert_same_function(model(tokens, stop_at_layer=2), cache["resid_post", -1])


def test_nobody_computes_logits_that_nobody_gets(model):
    """As in `HookedTransformer`: `return_type=None` stops after ln_final."""
    tokens = model.to_tokens("the cat sat")
    logits, whole = model.run_with_cache(tokens)
    nothing, cache = model.run_with_cache(tokens, return_type=None)
    assert nothing is None
    assert {*whole} - {*cache} == {"unembed.hook_in", "unembed.hook_out"}
    assert_same_function(model(tokens, unembed=False), whole["unembed.hook_in"])
    for cache_class in (KVCache, StaticKVCache):
        kv_cache = cache_class(model.cfg.n_layers, model.cfg.n_ctx)
        for read in tokens[:, :-1].split(1, dim=1):
            assert model(read, kv_cache, return_type=None) is None
        assert_same_function(model(tokens[:, -1:], kv_cache), logits[:, -1:])


def test_cfg_follows_the_weights():
    cfg = Config(**TINY.to_dict())
    model, other = DemoTransformer(cfg), DemoTransformer(cfg).to("meta")
    held = model.cfg
    assert (held.device.type, held.dtype) == ("cpu", torch.float32)
    assert other.cfg.device.type == "meta"
    assert deepcopy(model).half().cfg.dtype == torch.float16
    assert held.device.type == "cpu"
    assert model.cfg == cfg
    assert (cfg.layer_norm_eps, cfg.init_range) == (cfg.eps, cfg.initializer_range)


@pytest.mark.parametrize(
    "flags", [{"fold_ln": True}, {"center_unembed": True, "fold_value_biases": True}]
)
def test_weights_are_processed_while_they_are_loaded(tmp_path, flags):
    random_model(dtype=torch.float32).save_pretrained(tmp_path)
    plain = DemoTransformer.from_pretrained(tmp_path, device="cpu")
    processed = DemoTransformer.from_pretrained(tmp_path, device="cpu", **flags)
    names = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    all_flags = dict.fromkeys(names, False) | flags
    cfg, state = process_weights(plain.cfg, plain.state_dict(), **all_flags)
    assert processed.cfg == cfg
    assert all(torch.equal(processed.state_dict()[name], state[name]) for name in state)
    tokens = random_tokens()
    before, after = (each(tokens).double().log_softmax(-1) for each in (plain, processed))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"return_type": "losses"}, ValueError, "return_type is 'losses'; it must be 'logits' or"),
        ({"return_type": "loss", "last_only": True}, ValueError, "logits of all positions"),
        ({"return_type": "both", "stop_at_layer": 1}, ValueError, "logits of all positions"),
        ({"return_type": "loss", "unembed": False}, ValueError, "logits of all positions"),
        ({"loss_per_token": True}, ValueError, "loss_per_token needs return_type='loss'"),
        ({"prepend_bos": False}, TypeError, "for texts, not for token ids"),
        ({"padding_side": "left"}, TypeError, "for texts, not for token ids"),
        ({"past_kv_cache": None}, TypeError, "past_kv_cache.*: pass kv_cache=KVCache"),
        ({"unheard_of": None}, TypeError, "unexpected keyword argument 'unheard_of'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, arguments, error, message):
    with unchecked_types(), pytest.raises(error, match=message):
        model(torch.tensor([[1, 2, 3]]), **arguments)


def test_a_loss_of_nothing_is_refused(model):
    with pytest.raises(ValueError, match="needs a token after another"):
        model(torch.tensor([[1]]), return_type="loss")


def test_left_padding_keeps_gradients(model):
    training = deepcopy(model).requires_grad_(True)
    gradients = []
    for side in ("left", "right"):
        training(TEXTS, padding_side=side, return_type="loss").backward()
        gradients.append(training.blocks[0].attn.W_Q.grad)
        training.zero_grad()
    assert gradients[0].norm() > 0
    assert_same_function(*gradients)


@torch.no_grad()
def test_left_padded_ids_are_read_as_their_texts(model):
    """As in TransformerLens, if the tokenizer pads on the left."""
    watched = deepcopy(model)
    ids = watched.to_tokens(TEXTS, padding_side="left")
    texts = watched(TEXTS, padding_side="left")
    loss = watched(TEXTS, padding_side="left", return_type="loss")
    longer = watched.generate(TEXTS, 4, stop_tokens=[])
    assert not torch.allclose(watched(ids), texts)  # the side of the tokenizer is "right"
    assert watched.padding_mask(ids) is None
    watched.tokenizer = Tokenizer(watched.tokenizer.backend, padding_side="left")
    assert torch.equal(watched(ids), texts)
    assert torch.equal(watched(ids.tolist(), None), texts)
    assert torch.equal(watched(ids, return_type="loss"), loss)
    _, cache = watched.run_with_cache(ids, stop_at_layer=1)
    for row, text in enumerate(TEXTS):
        alone = watched.run_with_cache(text)[1]["resid_post", 0][0]
        assert_same_function(cache["resid_post", 0][row, -len(alone) :], alone)
    # In texts, it is known what is padding.
    again = "<|endoftext|>the cat"
    assert torch.equal(watched(again), model(again))
    continued = watched.generate(ids, 4)
    assert torch.equal(continued[:, : ids.shape[1]], ids)
    assert watched.generate(ids.tolist(), 4) == continued.tolist()
    for row, text in zip(continued, longer, strict=True):
        assert watched.tokenizer.decode(row, skip_special_tokens=True) == text


@torch.no_grad()
def test_the_padding_mask(model):
    watched, eot = deepcopy(model), model.tokenizer.eos_token_id
    watched.tokenizer = Tokenizer(watched.tokenizer.backend, padding_side="left")
    rows = torch.tensor([[eot, eot, 5, eot], [eot, 4, 5, 6], [4, eot, eot, 5], [eot] * 4])
    expected = [[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
    assert watched.padding_mask(rows).tolist() == expected
    assert watched.padding_mask(rows[1:3]) is None
    watched.tokenizer.pad_token_id = 5
    rows = torch.tensor([[5, 5, eot, 4], [eot, 5, 4, 4]])
    assert watched.padding_mask(rows).tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert watched.padding_mask(torch.full((1, 3), 5)).tolist() == [[0, 0, 1]]
    assert watched.padding_mask(rows.to("meta")) is None


def test_a_kv_cache_is_not_something_else(model):
    for wrong in ("loss", {}):
        with pytest.raises(TypeError, match=r"give a KVCache, and .* such as return_type='loss'"):
            model(TEXTS, wrong)


def test_what_is_not_one_token_is_refused(model):
    assert model.to_single_token(" cat") == model.tokenizer.encode(" cat")[0]
    with pytest.raises(ValueError, match=r"'catcat' is \d tokens: \["):
        model.to_single_token("catcat")
    with pytest.raises(ValueError, match="' cat' is not in the text"):
        model.get_token_position(" cat", "the mat")
    with unchecked_types(), pytest.raises(ValueError, match="mode is 'middle'"):
        model.get_token_position(" cat", "the cat", mode="middle")


def test_the_position_of_a_token_is_that_in_one_text(model):
    tokens = model.to_tokens(["the cat", "the mat"])
    assert model.get_token_position(" cat", tokens[:1]) == 2
    with unchecked_types(), pytest.raises(ValueError, match=r"shape \[2, \d\] are several texts"):
        model.get_token_position(" cat", tokens)
    with pytest.raises(TypeError, match="prepend_bos is for texts"):
        model.get_token_position(" cat", tokens[0], prepend_bos=False)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (-1, ValueError, "there is no token -1; ids run from 0 to"),
        (torch.tensor([3, 10**6]), ValueError, r"there is no token \[3, 1000000\]; ids run"),
        (torch.tensor(1.7), TypeError, "token ids must be integers, not torch.float32"),
        (torch.tensor([True, False]), TypeError, "token ids must be integers, not torch.bool"),
    ],
)
def test_only_tokens_of_the_vocabulary_have_directions(model, ids, error, message):
    with unchecked_types(), pytest.raises(error, match=message):
        model.tokens_to_residual_directions(ids)


def test_the_loss_is_of_the_tokens_that_gave_the_logits(model):
    tokens = model.to_tokens(["the cat", "the mat"])
    logits = model(tokens)
    for other in (tokens[:1], tokens[:, :-1]):
        with unchecked_types(), pytest.raises(ValueError, match=r"logits of \[2, \d\] \[batch pos"):
            model.loss_fn(logits, other)
        with unchecked_types(), pytest.raises(ValueError, match=r"logits of \[2, \d\] \[batch pos"):
            model.loss_fn(logits, tokens, torch.ones_like(other))


def test_texts_are_tokenized_once(model, monkeypatch):
    read = []
    to_rows = Tokenizer.to_rows
    monkeypatch.setattr(
        Tokenizer, "to_rows", lambda self, *given: read.append(given) or to_rows(self, *given)
    )
    model(TEXTS, return_type="loss")
    assert len(read) == 1


def test_a_swapped_module_without_the_weight_is_named(model):
    changed = deepcopy(model)
    changed.blocks[1].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"blocks.1.mlp is a Identity, which has no W_in"):
        _ = changed.W_in


def test_a_name_that_nobody_knows_is_an_attribute_error(model):
    assert not hasattr(model, "set_use_attn_result")
    with pytest.raises(AttributeError, match=r"'DemoTransformer' has no attribute 'unheard_of'$"):
        _ = model.unheard_of
