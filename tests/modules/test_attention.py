import math

import pytest
import torch
from einops import repeat
from hypothesis import given
from hypothesis import strategies as st

from clean_transformer.modules.attention import Attention, mix_fused

from ..helpers import (
    TINY,
    assert_gradients,
    assert_same_function,
    random_tensor,
    randomized,
    tiny,
    watch_everything,
)


@pytest.mark.parametrize("layer", range(12))
def test_equals_transformer_lens(theirs, device, dtype, layer: int):
    block = f"blocks.{layer}"
    attn = theirs.with_weights(Attention(theirs.cfg), f"{block}.attn").to(device, dtype)
    x = theirs.normalized(f"{block}.ln1").to(device, dtype)
    per_head = repeat(x, "batch pos d_model -> batch pos head d_model", head=theirs.cfg.n_heads)
    expected = theirs.cache[f"{block}.hook_attn_out"]
    assert_same_function(attn(x), expected)
    assert_same_function(attn(per_head), expected)

    output, cache = attn.run_with_cache(x, names_filter=lambda name: True)
    assert_same_function(output, expected)
    for name in {*cache} & {key.removeprefix(f"{block}.attn.") for key in theirs.cache}:
        finite = theirs.cache[f"{block}.attn.{name}"].isfinite()
        assert torch.equal(cache[name].isfinite().cpu(), finite)
        masked = cache[name].cpu().masked_fill(~finite, 0)
        assert_same_function(masked, theirs.cache[f"{block}.attn.{name}"].masked_fill(~finite, 0))


def formula(attn: Attention, x: torch.Tensor) -> torch.Tensor:
    """One query of one head at a time."""
    output = attn.b_O.expand_as(x).clone()
    for head in range(len(attn.W_Q)):
        q, k, v = (
            x @ getattr(attn, f"W_{letter}")[head] + getattr(attn, f"b_{letter}")[head]
            for letter in "QKV"
        )
        for query in range(x.shape[1]):
            past = slice(query + 1)
            weight = (q[:, [query]] * k[:, past]).sum(-1).div(math.sqrt(q.shape[-1])).softmax(-1)
            output[:, query] += (weight[..., None] * v[:, past]).sum(1) @ attn.W_O[head]
    return output


@given(
    n_heads=st.integers(1, 4),
    d_head=st.integers(1, 5),
    d_model=st.integers(1, 7),
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
)
def test_both_paths_are_the_formula(n_heads, d_head, d_model, batch, length):
    cfg = tiny(n_heads=n_heads, d_head=d_head, d_model=d_model)
    attn, x = randomized(Attention(cfg)), random_tensor(batch, length, d_model)
    expected = formula(attn, x)
    assert_same_function(attn(x), expected)
    watch_everything(attn)
    assert_same_function(attn(x), expected)


@pytest.mark.parametrize("watched", [False, True])
def test_nothing_reads_the_future(watched: bool):
    attn, x = randomized(Attention(TINY)), random_tensor(1, 6, TINY.d_model)
    if watched:
        watch_everything(attn)
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.equal(attn(x)[:, :4], attn(changed)[:, :4])
    assert not torch.isclose(attn(x)[:, 4:], attn(changed)[:, 4:]).any()


@pytest.mark.parametrize("own", [(), ("key",), ("value",), ("key", "value")])
def test_keys_and_values_read_the_queries_stream_unless_given_their_own(own: tuple[str, ...]):
    attn = randomized(Attention(TINY))
    streams = dict.fromkeys(("query", "key", "value"), random_tensor(2, 5, TINY.d_model))
    streams |= {name: random_tensor(2, 5, TINY.d_model, seed=len(name)) for name in own}
    _, cache = attn.run_with_cache(
        streams["query"], **{f"{name}_input": streams[name] for name in own}
    )
    for name, stream in streams.items():
        letter = name[0].upper()
        alone = torch.einsum("bpm,hmd->bphd", stream, getattr(attn, f"W_{letter}"))
        assert_same_function(cache[name[0]], alone + getattr(attn, f"b_{letter}"))


@pytest.mark.parametrize("n_queries", [1, 3, 8])
def test_fewer_queries_than_keys_are_the_last_ones(n_queries: int):
    attn = randomized(Attention(TINY))
    q, k, v = (random_tensor(2, 8, 3, 4, seed=seed) for seed in range(3))
    whole = attn.mix_explicitly(q, k, v)[:, -n_queries:]
    assert_same_function(attn.mix_explicitly(q[:, -n_queries:], k, v), whole)
    assert_same_function(mix_fused(q[:, -n_queries:], k, v), whole)


@pytest.mark.parametrize("kind", ["seen", "added"])
def test_both_paths_obey_a_mask(kind: str):
    attn = randomized(Attention(TINY))
    q, k, v = (random_tensor(2, 8, 3, 4, seed=seed) for seed in range(3))
    seen = random_tensor(2, 3, 8, 8) > 0
    seen[..., 0] = True
    added = random_tensor(1, 3, 8, 8)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    scores = scores.masked_fill(~seen, -math.inf) if kind == "seen" else scores + added
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    mask = seen if kind == "seen" else added
    assert_same_function(mix_fused(q, k, v, mask), expected)
    assert_same_function(attn.mix_explicitly(q, k, v, mask), expected)


def test_patterns_are_distributions_over_the_past():
    attn = randomized(Attention(TINY))
    _, cache = attn.run_with_cache(random_tensor(2, 6, TINY.d_model))
    pattern, scores = cache["pattern"], cache["attn_scores"]
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    # A sum of 6 rounded quotients.
    assert (pattern.sum(-1) - 1).abs().max() <= 6 * torch.finfo(torch.float64).eps
    assert (pattern[..., future] == 0).all()
    assert (scores[..., future] == -math.inf).all()
    assert scores[..., ~future].isfinite().all()


def test_results_of_the_heads_sum_to_the_output_without_its_bias():
    attn, x = randomized(Attention(TINY)), random_tensor(2, 5, TINY.d_model)
    _, cache = attn.run_with_cache(x, names_filter="hook_result")
    assert_same_function(cache["result"].sum(2) + attn.b_O, attn(x))


def test_hook_shapes():
    _, cache = Attention(TINY).run_with_cache(
        torch.ones(2, 5, TINY.d_model), names_filter=[*Attention(TINY).hook_dict]
    )
    assert {name: [*value.shape] for name, value in cache.items()} == {
        **{f"hook_{letter}": [2, 5, 3, 4] for letter in "qkv"},
        "hook_attn_scores": [2, 3, 5, 5],
        "hook_pattern": [2, 3, 5, 5],
        "hook_z": [2, 5, 3, 4],
        "hook_result": [2, 5, 3, 12],
    }


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("watched", [False, True])
def test_half_precision_is_exact_on_small_integers(half: torch.dtype, watched: bool):
    attn = Attention(TINY)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
        # Then each of two positions gets the plain mean of what it sees.
        attn.W_Q.zero_()
        attn.b_Q.zero_()
    x = torch.randint(-1, 2, (2, 2, TINY.d_model))
    exact = formula(attn.double(), x.double())
    assert exact.abs().max() < 64  # so that bfloat16's 8 bits hold every half-integer on the way
    if watched:
        watch_everything(attn)
    output = attn.to(half)(x.to(half))
    assert output.dtype == half
    assert torch.equal(output.double(), exact)


@pytest.mark.parametrize("watched", [False, True])
def test_gradients(watched: bool):
    attn = randomized(Attention(tiny(n_heads=2, d_head=2, d_model=3)))
    if watched:
        watch_everything(attn)
    assert_gradients(attn, random_tensor(2, 3, 3))


def test_merging_the_heads_of_a_new_weight_needs_no_copy():
    weight = Attention(TINY).W_Q
    assert weight.shape == (TINY.n_heads, TINY.d_model, TINY.d_head)
    assert weight.permute(1, 0, 2).is_contiguous()
