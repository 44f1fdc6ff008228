"""Each variant against its own definition, written once more in another way."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clean_transformer import variants
from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.attention import Attention
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.modules.mlp import MLP
from clean_transformer.variants import kernels
from clean_transformer.variants.attention import rotate
from clean_transformer.variants.linear_attention import elu_plus_one

from ..helpers import (
    assert_gradients,
    assert_same_function,
    quietly,
    random_tensor,
    random_tokens,
    randomized,
    tiny,
    watch_everything,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

CFG = tiny(n_heads=4)
WINDOW = 3


def softmax_of(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: score(*args).softmax(dim=-1)


def plain(q: Tensor, k: Tensor, distance: Tensor, slope: float) -> Tensor:
    return (q * k).sum(-1) / math.sqrt(q.shape[-1])


def alibi(q: Tensor, k: Tensor, distance: Tensor, slope: float) -> Tensor:
    return plain(q, k, distance, slope) - slope * distance


def rotary(q: Tensor, k: Tensor, distance: Tensor, slope: float) -> Tensor:
    """In the complex plane, by the distance alone."""
    n_pairs = q.shape[-1] // 2
    q, k = (torch.complex(x[..., :n_pairs], x[..., n_pairs:]) for x in (q, k))
    frequency = 1 / 10000 ** (torch.arange(n_pairs).double() / n_pairs)
    turned = q * k.conj() * torch.exp(1j * distance[:, None] * frequency)
    return turned.sum(-1).real / math.sqrt(2 * n_pairs)


def window(q: Tensor, k: Tensor, distance: Tensor, slope: float) -> Tensor:
    return plain(q, k, distance, slope) - 1e9 * (distance >= WINDOW)


def linear(q: Tensor, k: Tensor, distance: Tensor, slope: float) -> Tensor:
    products = ((F.elu(q) + 1) * (F.elu(k) + 1)).sum(-1)
    return products / products.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Case:
    """An attention, and the weights of the past keys that define it."""

    make: Callable[[Config], Attention]
    weights: Callable[..., Tensor]


def grouped(cfg: Config) -> Attention:
    return variants.GroupedQueryAttention(cfg, n_kv_heads=math.gcd(cfg.n_heads, 2))


CASES = {
    "alibi": Case(variants.AlibiAttention, softmax_of(alibi)),
    "rotary": Case(variants.RotaryAttention, softmax_of(rotary)),
    "window": Case(partial(variants.SlidingWindowAttention, window=WINDOW), softmax_of(window)),
    "linear": Case(variants.LinearAttention, linear),
    "grouped": Case(grouped, softmax_of(plain)),
    "multi-query": Case(variants.GroupedQueryAttention, softmax_of(plain)),
    "sdpa": Case(variants.SdpaAttention, softmax_of(plain)),
}
has_flex = pytest.mark.skipif(
    kernels.flex is None, reason="FlexAttention came with PyTorch 2.5, and this one is older"
)
KERNELS = pytest.mark.parametrize(
    "kernel",
    [variants.SdpaAttention, pytest.param(variants.FlexAttention, marks=has_flex)],
)
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
WATCHED = pytest.mark.parametrize("watched", [False, True])


def one_block(attn: nn.Module) -> DemoTransformer:
    """A model that knows positions from its attention only."""
    cfg = tiny(n_heads=4, n_layers=1)
    model = randomized(DemoTransformer(cfg))
    model.blocks[0].attn = attn
    model.pos_embed = variants.NoPositions(cfg).double()
    return model


# Attention.


def by_loops(attn: Attention, weights: Callable[..., Tensor], x: Tensor) -> Tensor:
    """One query of one head at a time, which averages the values with those weights."""
    n_heads, group = len(attn.W_Q), len(attn.W_Q) // len(attn.W_K)
    output = attn.b_O.expand_as(x).clone()
    for head in range(n_heads):
        shared = head // group
        q = x @ attn.W_Q[head] + attn.b_Q[head]
        k = x @ attn.W_K[shared] + attn.b_K[shared]
        v = x @ attn.W_V[shared] + attn.b_V[shared]
        slope = 2 ** (-8 * (head + 1) / n_heads)
        for query in range(x.shape[1]):
            past = slice(query + 1)
            distance = query - torch.arange(query + 1).double()
            weight = weights(q[:, [query]], k[:, past], distance, slope)
            output[:, query] += (weight[..., None] * v[:, past]).sum(1) @ attn.W_O[head]
    return output


@EVERY
@given(
    n_heads=st.integers(1, 4),
    n_pairs=st.integers(1, 3),
    d_model=st.integers(1, 7),
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
)
def test_attention_is_its_definition(case: Case, n_heads, n_pairs, d_model, batch, length):
    cfg = tiny(n_heads=n_heads, d_head=2 * n_pairs, d_model=d_model)
    attn, x = randomized(case.make(cfg)), random_tensor(batch, length, d_model)
    expected = by_loops(attn, case.weights, x)
    assert_same_function(attn(x), expected)
    watch_everything(attn)
    assert_same_function(attn(x), expected)


def read(attn: Attention, parts: Iterable[Tensor], attention_mask: Tensor | None = None) -> Tensor:
    """What attention gives for all positions, when it reads them part by part."""
    cache, outputs = KVCache(1, CFG.n_ctx, attention_mask), []
    for x in parts:
        outputs.append(attn(x, kv_cache=cache.layers[0]))
        cache.length += x.shape[1]
    return torch.cat(outputs, dim=1)


@EVERY
@given(data=st.data(), watched=st.booleans(), length=st.integers(1, CFG.n_ctx))
@torch.no_grad()
def test_reading_in_parts_gives_what_reading_at_once_gives(
    case: Case, data: st.DataObject, watched: bool, length: int
):
    attn, x = randomized(case.make(CFG)), random_tensor(2, length, CFG.d_model)
    cuts = sorted({0, *data.draw(st.sets(st.integers(1, length))), length})
    expected = attn(x)
    if watched:
        watch_everything(attn)
    assert_same_function(read(attn, (x[:, a:b] for a, b in pairwise(cuts))), expected)


@EVERY
@given(
    paddings=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    length=st.integers(5, CFG.n_ctx - 2),
    more=st.integers(0, 2),
    watched=st.booleans(),
)
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(
    case: Case, paddings: list[int], length: int, more: int, watched: bool
):
    attn = randomized(case.make(CFG))
    x = random_tensor(len(paddings), length + more, CFG.d_model)
    alone = [attn(x[[row], padding:]) for row, padding in enumerate(paddings)]
    if watched:
        watch_everything(attn)
    is_token = torch.arange(length) >= torch.tensor(paddings)[:, None]
    output = read(attn, x.split([length] + more * [1], dim=1), is_token.int())
    for row, padding in enumerate(paddings):
        assert_same_function(output[[row], padding:], alone[row])


@EVERY
@WATCHED
def test_nothing_reads_the_future(case: Case, watched: bool):
    attn, x = randomized(case.make(CFG)), random_tensor(1, 6, CFG.d_model)
    if watched:
        watch_everything(attn)
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.equal(attn(x)[:, :4], attn(changed)[:, :4])
    assert not torch.isclose(attn(x)[:, 4:], attn(changed)[:, 4:]).any()


@pytest.mark.parametrize("name", ["alibi", "rotary"])
def test_only_distances_matter(name: str):
    """All positions are shifted, behind keys that nobody sees."""
    attn = randomized(CASES[name].make(CFG))
    q, k, v = (random_tensor(2, 5, 4, 4, seed=seed) for seed in range(3))
    plain = Attention.mix(attn, q, k, v)
    for shift in (1, 7, 100):
        unseen = random_tensor(2, shift, 4, 4, seed=3)
        seen = torch.ones(5, 5 + shift, dtype=torch.bool).tril(shift)
        seen[:, :shift] = False
        shifted = attn.mix(q, torch.cat((unseen, k), 1), torch.cat((unseen, v), 1), seen)
        assert_same_function(shifted, attn.mix(q, k, v))
    assert not torch.isclose(attn.mix(q, k, v)[:, 1:], plain[:, 1:]).any()


def test_scores_of_alibi_are_lessened_by_the_distance():
    """Which softmax does not show: it only sees how distances differ."""
    seen: dict[type, Tensor] = {}
    q, k, v = (random_tensor(1, n, 4, 4, seed=n) for n in (2, 5, 5))
    for kind in (variants.AlibiAttention, Attention):
        attn = kind(CFG)
        attn.hook_attn_scores.register_forward_hook(
            lambda *call, kind=kind: seen.update({kind: call[-1]})
        )
        attn.mix(q, k, v)
    lessened = seen[Attention] - seen[variants.AlibiAttention]
    for head in range(4):
        for query, keys in enumerate((4, 5)):
            expected = 0.25 ** (head + 1) * torch.arange(keys).flip(0).double()
            assert_same_function(lessened[0, head, query, :keys], expected)


@EVERY
@WATCHED
def test_attention_has_gradients(case: Case, watched: bool):
    attn = randomized(case.make(tiny(n_heads=2, d_head=2, d_model=2)))
    if watched:
        watch_everything(attn)
    assert_gradients(attn, random_tensor(1, 3, 2))


@EVERY
@WATCHED
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_keeps_its_dtype(case: Case, watched: bool, half: torch.dtype):
    attn, x = randomized(case.make(CFG), half), random_tensor(2, 9, CFG.d_model, dtype=half)
    if watched:
        watch_everything(attn)
    output, exact = attn(x), attn.double()(x.double())
    assert output.dtype == half
    # Rounding leaves some units of the last place; half of the output would be another function.
    assert (output - exact).abs().max() <= 16 * torch.finfo(half).eps * exact.abs().max()


def mask_of(kind: str, n_queries: int, n_keys: int) -> Tensor | None:
    if kind == "causal":
        return None
    if kind == "added":
        return random_tensor(1, 4, n_queries, n_keys)
    seen = random_tensor(2, 1, n_queries, n_keys) > 0
    seen[..., 0] = True
    return seen


@KERNELS
@pytest.mark.parametrize(
    ("kind", "n_past"), [("causal", 0), ("causal", 4), ("seen", 4), ("added", 4)]
)
def test_each_kernel_equals_attention(kernel, kind: str, n_past: int):
    n_queries = 3
    q = random_tensor(2, n_queries, 4, 4)
    k, v = (random_tensor(2, n_past + n_queries, 4, 4, seed=seed) for seed in (1, 2))
    mask = mask_of(kind, n_queries, n_past + n_queries)
    expected = Attention(CFG).mix_explicitly(q, k, v, mask)
    assert_same_function(kernel(CFG).mix(q, k, v, mask), expected)


@has_flex
@torch.no_grad()
def test_flex_attention_takes_the_place_of_attention():
    attn, flex = randomized(Attention(CFG)), variants.FlexAttention(CFG).double()
    flex.load_state_dict(attn.state_dict())
    tokens, padded = random_tokens(CFG), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for attention_mask in (None, padded):
        caches = [KVCache(1, CFG.n_ctx, attention_mask) for _ in range(2)]
        logits, expected = (
            one_block(part)(tokens, cache) for part, cache in zip((flex, attn), caches, strict=True)
        )
        assert_same_function(logits, expected)


COMPILED = """
import torch
from clean_transformer import Attention, Config
from clean_transformer.variants import FlexAttention

cfg = Config(n_layers=1, n_heads=2, d_model=12, d_head=4, d_mlp=12, d_vocab=50, n_ctx=8)
attn, flex, x = Attention(cfg), FlexAttention(cfg), torch.randn(2, 5, 12)
flex.load_state_dict(attn.state_dict())
with torch.no_grad():
    compiled = torch.compile(flex, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, attn(x), rtol=1e-5, atol=1e-6)
"""


@pytest.mark.slow
@has_flex
def test_flex_attention_compiles_to_one_graph() -> None:
    """In a process of its own: the checks of types that tests have cannot be compiled."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_old_pytorch_without_flex_attention_is_named(monkeypatch):
    monkeypatch.setattr(kernels, "flex", None)
    with pytest.raises(ImportError, match=r"needs PyTorch 2\.5 or later, and this is "):
        variants.FlexAttention(CFG)


@pytest.mark.parametrize("kind", ["seen", "added"])
def test_linear_attention_takes_a_mask_as_factors(kind: str):
    attn = variants.LinearAttention(CFG)
    q, k, v = (random_tensor(2, 5, 4, 4, seed=seed) for seed in range(3))
    mask = mask_of(kind, 5, 5)
    weights = torch.einsum("bqhd,bkhd->bhqk", F.elu(q) + 1, F.elu(k) + 1)
    weights = weights * (mask.double() if kind == "seen" else mask.exp())
    expected = torch.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdim=True), v)
    assert_same_function(attn.mix(q, k, v, mask), expected)


def test_linear_attention_weighs_what_elu_rounds_away():
    x = torch.linspace(-80, 3, 200, requires_grad=True)
    weights = elu_plus_one(x)
    exact = torch.where(x > 0, x.double() + 1, x.double().exp())
    assert_same_function(weights / exact.float(), torch.ones(200))
    slopes = torch.autograd.grad(weights.sum(), x)[0]
    assert_same_function(slopes / exact.clamp(max=1).float(), torch.ones(200))


def full_and_grouped(n_kv_heads: int) -> tuple[Attention, Attention]:
    full = randomized(Attention(CFG))
    shared = variants.GroupedQueryAttention(CFG, n_kv_heads=n_kv_heads).double()
    shared.load_from(full)
    return full, shared


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_grouped_queries_start_from_the_mean_of_each_group(n_kv_heads: int):
    full, shared = full_and_grouped(n_kv_heads)
    group = CFG.n_heads // n_kv_heads
    for name, parameter in shared.named_parameters():
        given = full.get_parameter(name)
        if "K" in name or "V" in name:
            rows = [sum(given[i * group : (i + 1) * group]) / group for i in range(n_kv_heads)]
            given = torch.stack(rows)
        assert_same_function(parameter, given)
        assert parameter.requires_grad


def test_as_many_groups_as_heads_are_full_attention():
    full, shared = full_and_grouped(CFG.n_heads)
    x = random_tensor(2, 5, CFG.d_model)
    assert_same_function(shared(x), full(x))


def test_a_cache_of_grouped_queries_keeps_the_shared_keys_only():
    cache = KVCache(1, CFG.n_ctx)
    with torch.no_grad():
        one_block(randomized(grouped(CFG)))(random_tokens(CFG), cache)
    assert cache.layers[0].keys.shape == (2, CFG.n_ctx, 2, CFG.d_head)


def test_a_shared_key_reads_the_mean_of_its_heads_streams():
    attn, streams = randomized(grouped(CFG)), random_tensor(2, 5, 4, CFG.d_model)
    _, cache = attn.run_with_cache(streams)
    for group in range(2):
        mean = streams[:, :, 2 * group : 2 * group + 2].mean(2)
        for letter in "KV":
            W, b = (getattr(attn, f"{name}_{letter}")[group] for name in "Wb")
            assert_same_function(cache[letter.lower()][:, :, group], mean @ W + b)


def test_grouped_queries_may_be_watched_head_by_head():
    block, x = randomized(TransformerBlock(CFG)), random_tensor(2, 5, CFG.d_model)
    block.attn = randomized(grouped(CFG))
    watched, _ = block.run_with_cache(x, names_filter=[*block.hook_dict])
    assert_same_function(watched, block(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: variants.RotaryAttention(tiny(d_head=5)), "d_head=5 must be even"),
        (lambda: variants.SlidingWindowAttention(CFG, window=0), "window=0 must be 1 or more"),
        (lambda: variants.GroupedQueryAttention(CFG, 3), "n_kv_heads=3 must divide n_heads=4"),
        (lambda: variants.GroupedQueryAttention(CFG, 0), "n_kv_heads=0 must divide n_heads=4"),
    ],
)
def test_what_no_attention_can_be_is_refused(make: Callable[[], nn.Module], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# The other modules.


@given(
    d_model=st.integers(1, 9),
    leading=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    eps=st.sampled_from([1e-5, 1e-2, 1.0]),
)
def test_rms_norm_is_pytorchs(d_model: int, leading: list[int], eps: float):
    cfg = tiny(d_model=d_model, eps=eps)
    ours, theirs = randomized(variants.RMSNorm(cfg)), nn.RMSNorm(d_model, eps).double()
    theirs.weight.data = ours.w.data
    x = random_tensor(*leading, d_model)
    assert_same_function(ours(x), theirs(x))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_rms_norm_in_half_precision_normalizes_in_float32(half: torch.dtype):
    norm = randomized(variants.RMSNorm(CFG), half)
    # The square of 3,000 overflows float16.
    x = (random_tensor(2, 3, CFG.d_model) * 3000).to(half)
    output, cache = norm.run_with_cache(x)
    assert output.dtype == half
    assert cache["scale"].dtype == cache["normalized"].dtype == torch.float32
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + CFG.eps).sqrt()
    exact = exact * norm.w.double()
    # Two roundings to half, of the normalized value and of its product, each by half a unit.
    assert ((output - exact).abs() <= 1.001 * torch.finfo(half).eps * exact.abs()).all()


def mlp_by_formula(mlp: MLP, x: Tensor) -> Tensor:
    pre = x @ mlp.W_in
    if isinstance(mlp, variants.SwigluMLP):
        gate = x @ mlp.W_gate
        post = gate / (1 + (-gate).exp()) * pre + mlp.b_in
    elif isinstance(mlp, variants.ReluMLP):
        post = torch.where(pre + mlp.b_in > 0, pre + mlp.b_in, 0)
    else:
        post = (pre + mlp.b_in) * (1 + ((pre + mlp.b_in) / math.sqrt(2)).erf()) / 2
    return post @ mlp.W_out + mlp.b_out


MLPS = (variants.ExactGeluMLP, variants.ReluMLP, variants.SwigluMLP)


@pytest.mark.parametrize("kind", MLPS)
@given(
    d_model=st.integers(1, 9),
    d_mlp=st.integers(1, 9),
    batch=st.integers(1, 3),
    length=st.integers(1, 4),
)
def test_mlp_is_its_formula(kind, d_model: int, d_mlp: int, batch: int, length: int):
    mlp = randomized(kind(tiny(d_model=d_model, d_mlp=d_mlp)))
    x = random_tensor(batch, length, d_model)
    assert_same_function(mlp(x), mlp_by_formula(mlp, x))


def test_swiglu_starts_from_all_weights_but_the_bias_that_stands_elsewhere():
    old, new = randomized(MLP(CFG)), variants.SwigluMLP(CFG).double()
    new.load_from(old)
    for name in ("W_in", "W_out", "b_out"):
        assert torch.equal(new.get_parameter(name), old.get_parameter(name))
    assert not new.b_in.any()


def test_parallel_block_is_one_sum():
    block, x = randomized(variants.ParallelBlock(CFG)), random_tensor(2, 5, CFG.d_model)
    expected = x + block.attn(block.ln1(x)) + block.mlp(block.ln2(x))
    assert_same_function(block(x), expected)
    watch_everything(block)
    assert_same_function(block(x), expected)


@torch.no_grad()
def test_parallel_block_reads_on():
    model, tokens = one_block(randomized(Attention(CFG))), random_tokens(CFG)
    model.blocks[0], cache = randomized(variants.ParallelBlock(CFG)), KVCache(1, CFG.n_ctx)
    parts = [model(part, cache) for part in tokens.split(3, dim=1)]
    assert_same_function(torch.cat(parts, dim=1), model(tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_positions_the_order_of_the_past_does_not_matter(dtype: torch.dtype):
    model = one_block(randomized(Attention(CFG)))
    tokens = random_tokens(CFG)
    reordered = tokens[:, [2, 0, 4, 1, 5, 3, 6]]
    assert_same_function(model(tokens)[:, -1], model(reordered)[:, -1])
    model.to(dtype)
    logits, cache = model.run_with_cache(tokens)
    assert logits.dtype == cache["hook_pos_embed"].dtype == dtype
    assert cache["hook_pos_embed"].shape == (2, 7, CFG.d_model)
    assert not cache["hook_pos_embed"].any()
    assert not model.pos_embed.state_dict()


@pytest.mark.parametrize("kind", [variants.RMSNorm, *MLPS, variants.ParallelBlock])
def test_gradients(kind):
    module = randomized(kind(tiny(n_heads=1, d_head=2, d_model=2, d_mlp=3)))
    assert_gradients(module, random_tensor(1, 3, 2))


# Names.


def test_parameters_are_the_originals_but_where_the_docstring_says():
    def shapes(module: nn.Module) -> dict[str, list[int]]:
        return {name: [*parameter.shape] for name, parameter in module.named_parameters()}

    attention, mlp = shapes(Attention(CFG)), shapes(MLP(CFG))
    for case in (CASES[name] for name in ("alibi", "rotary", "window", "linear", "sdpa")):
        assert shapes(case.make(CFG)) == attention
    for kind in (variants.ExactGeluMLP, variants.ReluMLP):
        assert shapes(kind(CFG)) == mlp
    assert shapes(variants.ParallelBlock(CFG)) == shapes(TransformerBlock(CFG))
    assert shapes(variants.SwigluMLP(CFG)) == mlp | {"W_gate": mlp["W_in"]}
    assert shapes(variants.RMSNorm(CFG)) == {"w": [CFG.d_model]}
    two = {f"W_{x}": [2, CFG.d_model, CFG.d_head] for x in "KV"}
    assert shapes(grouped(CFG)) == attention | two | {f"b_{x}": [2, CFG.d_head] for x in "KV"}


def test_hook_points_are_the_originals_but_where_the_docstring_says():
    def points(module: nn.Module) -> set[str]:
        return {*module.hook_dict}

    attention, inner = points(Attention(CFG)), {"hook_attn_scores", "hook_pattern"}
    for case in (CASES[name] for name in ("alibi", "window", "linear", "grouped")):
        assert points(case.make(CFG)) == attention
    assert points(CASES["rotary"].make(CFG)) == attention | {"hook_rot_q", "hook_rot_k"}
    assert points(variants.SdpaAttention(CFG)) == attention - inner
    assert points(variants.RMSNorm(CFG)) == {"hook_scale", "hook_normalized"}
    assert points(variants.SwigluMLP(CFG)) == points(MLP(CFG)) | {"hook_pre_linear"}
    block = points(TransformerBlock(CFG))
    assert points(variants.ParallelBlock(CFG)) == block - {"hook_resid_mid"}


# Other implementations.


def test_rotary_rotates_as_llama_does():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = (random_tensor(2, 4, 9, 6, seed=seed) for seed in range(2))
    angle = torch.arange(9)[:, None] / 10000 ** (torch.arange(0, 6, 2).double() / 6)
    angle = torch.cat((angle, angle), dim=-1)[None]
    theirs = llama.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    for x, expected in zip((q, k), theirs, strict=True):
        ours = rotate(x.transpose(1, 2), torch.arange(9), 10000.0)
        assert_same_function(ours.transpose(1, 2), expected)


@pytest.mark.parametrize("n_heads", [1, 2, 4, 8])
def test_alibi_adds_what_bloom_adds(n_heads: int):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    q, k, v = (random_tensor(1, 9, n_heads, 4, seed=seed) for seed in range(3))
    added = bloom.build_alibi_tensor(torch.ones(1, 9), n_heads, torch.float64)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2 + added
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    pattern = scores.masked_fill(future, -math.inf).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
    assert_same_function(variants.AlibiAttention(tiny(n_heads=n_heads)).mix(q, k, v), expected)


# What each is in transformer_lens 3: its class there, and its configuration.
TWINS = {
    "alibi": ("Attention", {"positional_embedding_type": "alibi"}),
    "rotary": ("Attention", {"positional_embedding_type": "rotary", "rotary_dim": CFG.d_head}),
    "window": (
        "Attention",
        {"use_local_attn": True, "attn_types": ["local"], "window_size": WINDOW},
    ),
    "grouped": ("GroupedQueryAttention", {"n_key_value_heads": 2}),
    "swiglu": ("GatedMLP", {"act_fn": "silu"}),
    "rms": ("RMSNorm", {}),
    "parallel": (
        "TransformerBlock",
        {"parallel_attn_mlp": True, "normalization_type": "LN", "use_hook_mlp_in": True},
    ),
}
OTHERS = {
    "swiglu": variants.SwigluMLP,
    "rms": variants.RMSNorm,
    "parallel": variants.ParallelBlock,
}


def twin(kind: str, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Their module, with those parameters."""
    lens = pytest.importorskip("transformer_lens")
    parts = pytest.importorskip(
        "transformer_lens.components", reason="transformer_lens 4 has no components of its own"
    )
    class_name, changes = TWINS[kind]
    sizes = ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx", "eps")
    fields = {name: getattr(CFG, name) for name in sizes} | {"act_fn": "gelu_new"} | changes
    cfg = lens.HookedTransformerConfig(**fields, dtype=torch.float64)
    arguments = {"window": ("local", 0), "parallel": (0,), "swiglu": (), "rms": ()}
    module = getattr(parts, class_name)(cfg, *arguments.get(kind, ("global", 0)))
    for path, value in parameters.items():
        owner, _, name = path.rpartition(".")
        # Theirs keep what is shared under another name, and expand it under this one.
        name = f"_{name}" if kind == "grouped" and name[-1] in "KV" else name
        setattr(module.get_submodule(owner), name, value)
    return module


@pytest.mark.reference
@pytest.mark.parametrize("kind", TWINS)
def test_equals_transformer_lens_3(kind: str):
    ours = randomized(OTHERS[kind](CFG) if kind in OTHERS else CASES[kind].make(CFG))
    theirs = quietly(twin, kind, dict(ours.named_parameters()))
    seen: dict[str, Tensor] = {}
    for name, module in theirs.named_modules():
        module.register_forward_hook(lambda *call, name=name: seen.update({name: call[-1]}))
    x = random_tensor(2, 7, CFG.d_model)
    expected = theirs(x) if kind in OTHERS else theirs(x, x, x)
    output, cache = ours.run_with_cache(x)
    assert_same_function(output, expected)
    for name, value in cache.items():
        assert_same_function(value.nan_to_num(neginf=0), seen[name].nan_to_num(neginf=0))
