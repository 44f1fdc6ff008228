"""What people pass by mistake, or in another form than we do, and what they are then told."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clean_transformer.analysis.attribution import logit_attribution
from clean_transformer.analysis.prediction import predict
from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache, StaticKVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.embed import Embed
from clean_transformer.swapping import swap
from clean_transformer.text.settings import Sampling
from clean_transformer.training.loop import train
from clean_transformer.training.settings import Training
from clean_transformer.weights.formats.huggingface import HUGGINGFACE
from clean_transformer.weights.refusals import WeightsError

from .helpers import (
    TINY,
    assert_equal_states,
    assert_same_function,
    random_model,
    random_tokens,
    reading_model,
    tiny,
    unchecked_types,
)

IDS = [[1, 2, 3], [4, 5, 6]]

# Other forms with a plain meaning.


@pytest.mark.parametrize("given", [IDS, tuple(IDS), np.array(IDS), torch.tensor(IDS).int()])
def test_a_model_reads_ids_in_every_form(given: Any):
    model = random_model()
    with unchecked_types():
        assert torch.equal(model(given), model(torch.tensor(IDS)))
        assert model.run_with_cache(given)[0].shape == (2, 3, TINY.d_vocab)


@pytest.mark.parametrize("given", [[5, 6], (5, 6), np.array([5, 6]), ["a cat"], ("a cat",)])
def test_one_text_in_every_form(given: Any):
    model = reading_model()
    plain = "a cat" if isinstance(given[0], str) else torch.tensor([5, 6])
    with unchecked_types():
        assert torch.equal(predict(model, given).losses, predict(model, plain).losses)


def test_a_token_as_text():
    model = reading_model()
    a, b = model.to_single_token("a"), model.to_single_token("b")
    as_text, as_ids = (logit_attribution(model, "cat", *pair) for pair in (("a", "b"), (a, b)))
    assert as_text.difference == as_ids.difference
    assert as_text.rest == as_ids.rest
    with pytest.raises(ValueError, match=r"'cats' is \d tokens"):
        logit_attribution(model, "cat", "cats", "b")


@pytest.mark.parametrize("as_given", [torch.from_numpy, np.ndarray.tolist])
def test_tokens_to_train_on_in_every_form(tmp_path: Path, as_given: Callable[[Any], Any]):
    array = random_tokens(length=80)[0].numpy()
    settings = Training(steps=1, batch=1)
    trained = []
    for number, tokens in enumerate((array, as_given(array))):
        trained.append(random_model(dtype=torch.float32))
        train(trained[-1], tokens, tmp_path / str(number), settings, held_out=tokens, device="cpu")
    assert_equal_states(trained[1].state_dict(), trained[0].state_dict())


@pytest.mark.parametrize("dtype", ["float16", "torch.float16", torch.float16])
def test_a_dtype_by_name(dtype: Any):
    assert DemoTransformer.from_pretrained("demo", dtype=dtype).cfg.dtype == torch.float16


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-30])
def test_a_tiny_temperature_is_greedy(temperature: float):
    # In float32, 5e-324 rounds to 0, and 0 / 0 is NaN.
    model, prompt = random_model(dtype=torch.float32), random_tokens(length=3)
    with unchecked_types():
        assert torch.equal(
            model.generate(prompt, 6, temperature=temperature, top_p=0.9, seed=0),
            model.generate(prompt, 6),
        )


# What is refused.


def apart(nan: bool = False) -> dict[str, torch.Tensor]:
    state = dict(HUGGINGFACE.write(TINY, random_model().state_dict()))
    if nan:
        state["transformer.wte.weight"][3, 1] = torch.nan
    return state | {"lm_head.weight": state["transformer.wte.weight"] + (0 if nan else 1)}


def call(kwargs: dict[str, Any]) -> Callable[[], Any]:
    return lambda: random_model()(random_tokens(), **kwargs)


MISTAKES = {
    "ragged ids": (lambda: random_model()([[1, 2], [3]]), TypeError, "equally long lists of ids"),
    "no ids": (lambda: random_model()({"input_ids": 1}), TypeError, "token ids must be a tensor"),
    "mixed": (lambda: reading_model()(["a", 1]), TypeError, "a text or a list of texts"),
    "one axis": (lambda: random_model()([1, 2]), ValueError, "they must be [batch pos]"),
    "two texts": (lambda: predict(reading_model(), ["a", "b"]), ValueError, "one text, not 2"),
    "no text": (lambda: predict(reading_model(), {}), TypeError, "token ids must be a tensor"),
    "no token": (
        lambda: logit_attribution(reading_model(), "a", 1.5, 2),
        TypeError,
        "cannot be interpreted as an integer",
    ),
    "text to train on": (
        lambda: train(random_model(), "some text", "never", Training(steps=1, batch=1)),
        TypeError,
        "tokens are a text; give its ids",
    ),
    "dtype": (
        lambda: DemoTransformer.from_pretrained("demo", dtype="half"),
        ValueError,
        "no dtype 'half'; choose from float64, float32, bfloat16, float16",
    ),
    "integer dtype": (
        lambda: DemoTransformer.from_pretrained("demo", dtype=torch.int64),
        ValueError,
        "no dtype 'int64'; choose from",
    ),
    "lm_head trained apart": (
        lambda: DemoTransformer.from_state_dict(apart(), TINY),
        WeightsError,
        "has its own unembedding, which differs from the embedding, but the architecture uses the "
        "embedding as the unembedding; set tied_unembed (in config.json: tie_word_embeddings)",
    ),
    "b_U trained": (
        lambda: random_model(b_U=True).save_pretrained("never"),
        WeightsError,
        "no place for unembed.b_U, which is not zero. GPT-2 has no such parameter: if an optimizer "
        "of yours trained it, leave it out",
    ),
}


@pytest.mark.parametrize(("mistake", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake(mistake: Callable[[], Any], error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)), unchecked_types():
        mistake()


def test_equal_weights_with_nan_are_tied():
    model = DemoTransformer.from_state_dict(apart(nan=True), TINY)
    assert model.cfg.tied_unembed


# A wrong keyword names the function that was called, and the nearest name.

KEYWORDS = {
    "generate": (lambda **k: random_model().generate([[1]], **k), "max_tokens", "max_new_tokens"),
    "DemoTransformer": (lambda **k: random_model()([[1]], **k), "kv_cach", "kv_cache"),
    "run_with_cache": (
        lambda **k: random_model().run_with_cache([[1]], **k),
        "name_filter",
        "names_filter",
    ),
    "run_with_hooks": (
        lambda **k: random_model().run_with_hooks([[1]], **k),
        "fwd_hook",
        "fwd_hooks",
    ),
    "hooks": (lambda **k: random_model().hooks(**k), "bwd_hook", "bwd_hooks"),
    "from_pretrained": (
        lambda **k: DemoTransformer.from_pretrained("demo", **k),
        "fold_layernorm",
        "fold_ln",
    ),
    "from_state_dict": (lambda **k: DemoTransformer.from_state_dict({}, **k), "config", "cfg"),
    "Config": (lambda **k: Config(**k), "n_layer", "n_layers"),
    "Sampling": (lambda **k: Sampling(**k), "temprature", "temperature"),
    "Training": (lambda **k: Training(**k), "step", "steps"),
}


@pytest.mark.parametrize("function", KEYWORDS)
def test_a_wrong_keyword(function: str):
    made, wrong, near = KEYWORDS[function]
    message = f"{function}() got an unexpected keyword argument '{wrong}'; did you mean '{near}'?"
    with pytest.raises(TypeError, match=re.escape(message)):
        made(**{wrong: 1})


def test_a_part_of_a_model_and_a_replaced_forward_take_their_own_keywords():
    model = random_model()
    with pytest.raises(TypeError, match=r"run_with_cache\(\) got .* 'query'; did you mean 'query_"):
        model.blocks[0].attn.run_with_cache(torch.zeros(1, 2, 12).double(), query=1)
    model.forward = lambda tokens, anything: anything
    assert model(torch.tensor(IDS), anything=3) == 3


# KV caches.


@torch.no_grad()
def filled(kind: type[KVCache], batch: int = 2, n_layers: int = 2, **changes: Any) -> KVCache:
    cache = kind(n_layers, TINY.n_ctx)
    random_model(tiny(n_layers=n_layers, **changes))(random_tokens(batch=batch, length=2), cache)
    return cache


@pytest.mark.parametrize("kind", [KVCache, StaticKVCache])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 2}, "the cache holds a batch of 2, but the tokens are a batch of 1"),
        ({"batch": 3}, "the cache holds a batch of 3, but the tokens are a batch of 1"),
        ({"n_layers": 1}, "the cache has 1 layers, and the model has 2"),
        ({"n_layers": 3}, "the cache has 3 layers, and the model has 2"),
    ],
)
def test_a_cache_of_another_batch_or_depth(kind: type[KVCache], changes: dict, message: str):
    cache = filled(kind, **changes)
    with pytest.raises(ValueError, match=message):
        random_model()(random_tokens(batch=1), cache)
    assert cache.length == 2


@torch.no_grad()
def test_a_cache_of_another_model():
    for other in ({"n_heads": 2, "d_head": 6}, {"d_head": 5}):
        with pytest.raises(ValueError, match="another model filled it, so use a new KVCache"):
            random_model()(random_tokens(batch=1), filled(KVCache, batch=1, **other))
    with pytest.raises(ValueError, match=r"in torch\.float64, not of .* in torch\.float32"):
        random_model(dtype=torch.float32)(random_tokens(batch=1), filled(KVCache, batch=1))


@torch.no_grad()
def test_a_cache_with_more_room_than_the_model():
    model, cache = random_model(), KVCache(2, 99, torch.tensor([[0, 0, 1], [0, 1, 1]]))
    model(random_tokens(length=3), cache)
    model(random_tokens(length=8), cache)  # up to position 9 of the second text, the last one
    with pytest.raises(ValueError, match="1 tokens after the 11 in the cache are more than the n_"):
        model(random_tokens(length=1), cache)


def test_a_padding_mask_of_another_batch():
    mask = torch.tensor([[0, 1], [1, 1]])
    with pytest.raises(ValueError, match="the cache holds a batch of 2"):
        random_model()(random_tokens(batch=1, length=2), KVCache(2, 10, mask))


# A tied unembedding whose embedding was swapped out.


def swapped_out() -> DemoTransformer:
    model = random_model(dtype=torch.float32)
    swap(model, "embed", lambda old, path: Embed(TINY))
    return model


def test_a_swapped_out_embedding_is_never_saved_in_silence(tmp_path: Path):
    model = swapped_out()
    with pytest.raises(WeightsError, match="tied to an embedding that was swapped out"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with pytest.warns(UserWarning, match="this state dict is incomplete: the unembedding is tied"):
        model.state_dict()


def test_a_swapped_out_embedding_moves_with_the_model():
    model = swapped_out()
    before = model(random_tokens())
    assert model.double().unembed.W_U.dtype == torch.float64
    torch.testing.assert_close(model(random_tokens()).float(), before, rtol=1e-5, atol=1e-5)
    assert model.to("meta").unembed.W_U.device.type == "meta"
    assert_same_function(random_model()(random_tokens()), random_model()(random_tokens()))


def test_qk_and_ov_need_transformer_lens(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    model = random_model()
    for owner in (model, model.blocks[0].attn):
        for name in ("QK", "OV"):
            with pytest.raises(ImportError, match=r"pip install 'clean-transformer\[bridge\]'"):
                getattr(owner, name)


# NaN.


@torch.no_grad()
def broken(parameter: str, *index: int, value: float = torch.nan) -> DemoTransformer:
    model = random_model()
    model.get_parameter(parameter)[index] = value
    return model


@pytest.mark.parametrize("arguments", [{}, {"temperature": 1.0}, {"beams": 2}])
@pytest.mark.parametrize(
    ("parameter", "index", "where"),
    [
        ("blocks.1.mlp.W_in", (0, 0), "blocks.1.mlp.hook_pre at position 0"),
        ("embed.W_E", (6, 0), "hook_embed at position 1"),
        ("pos_embed.W_pos", (5, 2), "hook_pos_embed at position 5"),
        ("blocks.0.attn.b_Q", (0, 1), "blocks.0.attn.hook_q at position 0"),
        ("unembed.b_U", (3,), "unembed.hook_out at position 0"),
    ],
)
def test_nan_stops_and_says_where_it_began(parameter: str, index, where: str, arguments: dict):
    model = broken(parameter, *index)
    prompts = [[1], [1, 2, 3]] if parameter == "pos_embed.W_pos" else [[1, 6, 3]]
    message = f"first NaN or infinity: {where}; the weights {parameter} are not finite"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        model.generate(prompts, 6, **arguments)


def test_an_overflow_is_said_with_its_dtype():
    model = broken("blocks.0.mlp.b_in", value=6e4).half()
    nn.init.ones_(model.blocks[0].mlp.W_out)
    with pytest.raises(RuntimeError, match=r"after 0 new tokens.*hook_mlp_out .*float16 ends at"):
        model.generate([[1]], 2)


def test_masked_logits_are_no_fault():
    model = random_model()

    def ban(logits, hook):
        logits[..., 5:] = -torch.inf
        return logits

    with model.hooks(fwd_hooks=[("unembed.hook_out", ban)]):
        assert model.generate(torch.tensor([[1]]), 5).max() < 5
