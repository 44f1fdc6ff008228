"""Predictions against the model's own logits; attributions against their sum."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clean_transformer.analysis.attribution import LogitAttribution, logit_attribution
from clean_transformer.analysis.lens import logit_lens
from clean_transformer.analysis.prediction import predict
from clean_transformer.model import DemoTransformer
from clean_transformer.modules import Attention
from clean_transformer.swapping.swaps import swap
from clean_transformer.variants import ReluMLP, RMSNorm

from ..helpers import (
    TINY,
    assert_same_function,
    configs,
    random_model,
    random_tokens,
    reading_model,
    tiny,
    unchecked_types,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDED = tiny(normalization_type="LNPre", tied_unembed=False)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@torch.no_grad()
def logits_of(model: DemoTransformer, tokens: Tensor) -> Tensor:
    """In float64, of one text."""
    return model(tokens)[0].double()


@given(cfg=configs(n_ctx=6), top=st.integers(1, 6), length=st.integers(1, 6))
def test_the_likeliest_and_the_least_likely(cfg, top: int, length: int):
    model, tokens = random_model(cfg), random_tokens(cfg, 1, length)
    logits = logits_of(model, tokens)[-1]
    if top > cfg.d_vocab:
        with pytest.raises(ValueError, match=f"top is {top}; it must be from 1 to {cfg.d_vocab}"):
            predict(model, tokens, top)
        return
    prediction = predict(model, tokens, top)
    ascending = sorted(logits.tolist())
    assert [score.logit for score in prediction.bottom] == ascending[:top]
    assert [score.logit for score in prediction.top] == ascending[::-1][:top]
    for score in prediction.top + prediction.bottom:
        assert score.logit == logits[score.id]
        assert score.probability == pytest.approx(float(logits.softmax(-1)[score.id]), rel=1e-12)


@given(cfg=configs(n_ctx=6), length=st.integers(1, 6))
def test_the_probability_of_each_actual_token(cfg, length: int):
    model, tokens = random_model(cfg), random_tokens(cfg, 1, length)
    prediction = predict(model, tokens[0], 1)
    probabilities = logits_of(model, tokens).softmax(-1)
    expected = [float(probabilities[i, token]) for i, token in enumerate(tokens[0, 1:])]
    assert prediction.token_probabilities.tolist() == pytest.approx(expected, rel=1e-12)
    assert prediction.losses.tolist() == pytest.approx([-math.log(p) for p in expected], abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_is_summed_in_float32(dtype: torch.dtype):
    model, tokens = random_model(dtype=dtype), random_tokens(batch=1)
    prediction = predict(model, tokens, 1)
    exact = logits_of(model, tokens).log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    assert prediction.losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(-prediction.losses.double(), exact, rtol=1e-5, atol=0)
    lens, _ = logit_lens(model, tokens)
    assert lens.dtype == prediction.losses.dtype


@pytest.mark.parametrize("cfg", [TINY, FOLDED])
def test_the_lens_ends_with_what_the_model_says(cfg):
    model, tokens = random_model(cfg, b_U=True), random_tokens(cfg, 1)
    lens, labels = logit_lens(model, tokens)
    assert labels == ["0_pre", "1_pre", "final_post"]
    assert_same_function(lens[-1], model(tokens)[0].log_softmax(-1))
    # After no block at all, the embeddings speak.
    embedded = model.embed(tokens) + model.pos_embed(tokens)
    spoken = model.unembed(model.ln_final(embedded))[0].log_softmax(-1)
    assert_same_function(lens[0], spoken)
    # The model that ends after a block says what the lens sees there.
    model.blocks = model.blocks[:1]
    assert_same_function(lens[1], model(tokens)[0].log_softmax(-1))


def total(attribution: LogitAttribution) -> float:
    parts = [*attribution.heads.flatten(), *attribution.mlps, *attribution.rest.values()]
    return math.fsum(map(float, parts))


@pytest.mark.parametrize("cfg", [TINY, FOLDED])
@given(
    length=st.integers(1, TINY.n_ctx),
    token=st.integers(0, TINY.d_vocab - 1),
    other=st.integers(0, TINY.d_vocab - 1),
)
def test_the_parts_sum_to_the_difference(cfg, length: int, token: int, other: int):
    model, tokens = random_model(cfg, b_U=True), random_tokens(cfg, 1, length)
    logits = logits_of(model, tokens)[-1]
    attribution = logit_attribution(model, tokens, token, other)
    assert attribution.difference == pytest.approx(float(logits[token] - logits[other]), abs=1e-12)
    assert total(attribution) == pytest.approx(attribution.difference, abs=1e-12)
    assert attribution.heads.shape == (cfg.n_layers, cfg.n_heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parts_sum_to_the_difference_but_for_rounding(dtype: torch.dtype):
    model, tokens = random_model(dtype=dtype), random_tokens(batch=1)
    attribution = logit_attribution(model, tokens, 3, 9)
    scale = float(attribution.heads.abs().sum() + attribution.mlps.abs().sum()) + sum(
        map(abs, attribution.rest.values())
    )
    # Sums of at most 20 products, of numbers that were rounded fewer than 20 times before.
    assert abs(total(attribution) - attribution.difference) < 40 * torch.finfo(dtype).eps * scale


class Gated(Attention):
    def forward(self, query_input, key_input=None, value_input=None, kv_cache=None):
        return 0.5 * super().forward(query_input, key_input, value_input, kv_cache)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("path", "make", "why"),
    [
        ("blocks.1.attn", Gated, "blocks.1.attn is a Gated"),
        ("ln_final", RMSNorm, "ln_final is a RMSNorm"),
    ],
)
def test_parts_that_do_not_sum_to_the_difference_are_refused(dtype, path: str, make, why: str):
    model = random_model(dtype=dtype)
    swap(model, path, make)
    with pytest.raises(ValueError, match=rf"sum to .* because .* add up like GPT-2: {why}$"):
        logit_attribution(model, random_tokens(batch=1), 3, 9)


def test_a_swapped_mlp_adds_up():
    model = random_model()
    swap(model, "blocks.0.mlp", ReluMLP)
    attribution = logit_attribution(model, random_tokens(batch=1), 3, 9)
    assert total(attribution) == pytest.approx(attribution.difference, abs=1e-12)


@pytest.mark.parametrize("cfg", [TINY, FOLDED])
@torch.no_grad()
def test_a_part_is_what_the_difference_loses_without_it(cfg):
    model, tokens = random_model(cfg, b_U=True), random_tokens(cfg, 1)
    attribution = logit_attribution(model, tokens, 3, 9)
    parts = ("hook_scale", "hook_result", "embed", "hook_mlp_out", "hook_resid_post")
    names = [name for name in model.hook_dict if name.endswith(parts)]
    _, cache = model.run_with_cache(tokens, names_filter=names, remove_batch_dim=True)
    scale = cache["scale", "ln_final"][-1]

    def difference(residual: Tensor) -> float:
        normalized = (residual - residual.mean()) / scale
        if cfg.normalization_type == "LN":
            normalized = normalized * model.ln_final.w + model.ln_final.b
        logits = model.unembed(normalized[None, None])[0, 0]
        return float(logits[3] - logits[9])

    whole = cache["resid_post", -1][-1]
    lost = {
        name: difference(whole) - difference(whole - part)
        for name, part in {
            "embed.W_E": cache["hook_embed"][-1],
            "pos_embed.W_pos": cache["hook_pos_embed"][-1],
            **{f"blocks.{n}.attn.b_O": model.blocks[n].attn.b_O for n in range(cfg.n_layers)},
            **{f"mlp {n}": cache["mlp_out", n][-1] for n in range(cfg.n_layers)},
            **{
                f"head {n} {head}": cache["result", n][-1, head]
                for n in range(cfg.n_layers)
                for head in range(cfg.n_heads)
            },
        }.items()
    }
    for name, part in lost.items():
        match name.split():
            case ["head", layer, head]:
                attributed = attribution.heads[int(layer), int(head)]
            case ["mlp", layer]:
                attributed = attribution.mlps[int(layer)]
            case _:
                attributed = attribution.rest[name]
        assert float(attributed) == pytest.approx(part, abs=1e-12), name


def test_texts_are_read_with_the_models_tokenizer():
    model = reading_model()
    tokens = model.to_tokens("the cat")
    assert predict(model, "the cat").top == predict(model, tokens).top
    assert torch.equal(logit_lens(model, "the cat")[0], logit_lens(model, tokens)[0])
    assert (
        logit_attribution(model, "the cat", 1, 2).rest
        == logit_attribution(model, tokens[0], 1, 2).rest
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predict(random_model(), random_tokens(batch=2)), "takes one text, not 2"),
        (lambda: predict(random_model(), random_tokens(batch=1), 0), "it must be from 1 to 31"),
        (lambda: predict(random_model(), "text"), "this model came without a tokenizer"),
        (
            lambda: logit_attribution(random_model(), random_tokens(batch=1), 3, 31),
            "there is no token 31; ids run from 0 to 30",
        ),
        (
            lambda: logit_attribution(random_model(), random_tokens(batch=1), -1, 3),
            "there is no token -1; ids run from 0 to 30",
        ),
    ],
)
def test_what_cannot_be_done(call, message: str):
    with pytest.raises(ValueError, match=re.escape(message)), unchecked_types():
        call()
