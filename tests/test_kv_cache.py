import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clean_transformer.kv_cache import KVCache, StaticKVCache, left_padding
from clean_transformer.model import DemoTransformer
from clean_transformer.swapping import swap

from .helpers import TINY, assert_same_function, random_tokens, randomized

pytestmark = pytest.mark.filterwarnings(
    "ignore::clean_transformer.swapping.swaps.HookPointsLost"  # by `Averaging`
)
N_LAYERS, N_CTX = TINY.n_layers, TINY.n_ctx


class Averaging(nn.Module):
    """Attention that takes no KV cache: the mean of the inputs so far."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def model(attn: str = "ours") -> DemoTransformer:
    made = randomized(DemoTransformer(TINY))
    if attn == "of a person":
        swap(made, "blocks.*.attn", Averaging())
    return made


def chunks(length: int) -> st.SearchStrategy[list[int]]:
    """Where to cut that many positions."""
    return st.sets(st.integers(1, max(length - 1, 1))).map(lambda cuts: sorted({0, *cuts, length}))


@pytest.mark.parametrize("kind", [KVCache, StaticKVCache])
@pytest.mark.parametrize("attn", ["ours", "of a person"])
@pytest.mark.parametrize("watched", [False, True])
@given(data=st.data(), batch=st.integers(1, 3), length=st.integers(1, N_CTX))
@torch.no_grad()
def test_reading_in_chunks_gives_what_reading_at_once_gives(
    kind: type[KVCache], attn: str, watched: bool, data: st.DataObject, batch: int, length: int
):
    ours, tokens = model(attn), random_tokens(TINY, batch, length)
    cuts = data.draw(chunks(length))
    cache = kind(N_LAYERS, N_CTX)
    parts = []
    for start, end in pairwise(cuts):
        if watched:
            logits, seen = ours.run_with_cache(tokens[:, start:end], kv_cache=cache)
            assert seen["resid_post", 0].shape[1] == end - start
        else:
            logits = ours(tokens[:, start:end], kv_cache=cache)
        parts.append(logits)
    assert cache.length == length
    assert_same_function(torch.cat(parts, dim=1), ours(tokens))


@pytest.mark.parametrize("kind", [KVCache, StaticKVCache])
@pytest.mark.parametrize("attn", ["ours", "of a person"])
@pytest.mark.parametrize("watched", [False, True])
@given(
    paddings=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    length=st.integers(5, N_CTX - 2),
    more=st.integers(0, 2),
)
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(
    kind: type[KVCache], attn: str, watched: bool, paddings: list[int], length: int, more: int
):
    ours, tokens = model(attn), random_tokens(TINY, len(paddings), length + more)
    is_token = torch.arange(length) >= torch.tensor(paddings)[:, None]
    cache = kind(N_LAYERS, N_CTX, attention_mask=is_token.int())
    run = (lambda *args: ours.run_with_cache(*args)[0]) if watched else ours
    parts = [run(tokens[:, :length], cache)]
    parts += [run(tokens[:, place, None], cache) for place in range(length, length + more)]
    for row, padding in enumerate(paddings):
        alone = ours(tokens[row : row + 1, padding:])
        assert_same_function(torch.cat(parts, 1)[row : row + 1, padding:], alone)


@pytest.mark.parametrize("kind", [KVCache, StaticKVCache])
@pytest.mark.parametrize("attn", ["ours", "of a person"])
@pytest.mark.parametrize("paddings", [None, [0, 2, 1]])
@torch.no_grad()
def test_selected_rows_are_read_on_from(kind: type[KVCache], attn: str, paddings: list[int] | None):
    ours, tokens, rows = model(attn), random_tokens(TINY, 3, 5), [1, 2, 0, 1]
    more = random_tokens(TINY, len(rows), 1, seed=1)

    def read(rows: list[int]) -> KVCache:
        starts = torch.tensor([paddings[row] for row in rows] if paddings else [])
        mask = (torch.arange(5) >= starts[:, None]).int() if paddings else None
        cache = kind(N_LAYERS, N_CTX, mask)
        ours(tokens[rows], cache)
        return cache

    selected = read([0, 1, 2])
    selected.select(torch.tensor(rows))
    assert_same_function(ours(more, selected), ours(more, read(rows)))


@torch.no_grad()
def test_a_pass_that_breaks_off_leaves_nothing_behind():
    ours, tokens, cache = model(), random_tokens(TINY, 2, 6), KVCache(N_LAYERS, N_CTX)
    ours(tokens[:, :3], cache)

    def break_off(*_: object) -> None:
        raise KeyboardInterrupt

    handle = ours.blocks[-1].mlp.register_forward_hook(break_off)
    with pytest.raises(KeyboardInterrupt):
        ours(tokens[:, :2] * 0, cache)
    handle.remove()
    assert cache.length == 3
    assert_same_function(ours(tokens[:, 3:], cache), ours(tokens)[:, 3:])


@torch.no_grad()
def test_memory_is_taken_once_and_holds_the_dtype_of_the_keys():
    ours, cache = model().bfloat16(), KVCache(N_LAYERS, N_CTX)
    ours(random_tokens(TINY, 2, 3), cache)
    keys = [layer.keys for layer in cache.layers]
    ours(random_tokens(TINY, 2, 1), cache)
    assert all(layer.keys is before for layer, before in zip(cache.layers, keys, strict=True))
    assert {(*key.shape, key.dtype) for key in keys} == {
        (2, N_CTX, TINY.n_heads, TINY.d_head, torch.bfloat16)
    }


@torch.no_grad()
def test_too_many_positions_are_refused_before_any_work():
    ours, cache = model(), KVCache(N_LAYERS, n_ctx=6)
    ours(random_tokens(TINY, 1, 4), cache)
    message = "3 tokens after the 4 in the cache are more than its n_ctx=6 positions"
    with pytest.raises(ValueError, match=re.escape(message)):
        ours(random_tokens(TINY, 1, 3), cache)
    assert cache.length == 4


@pytest.mark.parametrize("kind", [KVCache, StaticKVCache])
@torch.no_grad()
def test_positions_that_the_model_lacks_are_refused_before_any_work(kind: type[KVCache]):
    ours, cache = model(), kind(N_LAYERS, n_ctx=100)
    ours(random_tokens(TINY, 1, TINY.n_ctx), cache)
    message = f"1 tokens after the {TINY.n_ctx} in the cache are more than the n_ctx={TINY.n_ctx}"
    with pytest.raises(ValueError, match=re.escape(message)):
        ours(random_tokens(TINY, 1, 1), cache)
    assert cache.length == TINY.n_ctx

    # Padding takes no position.
    padded = kind(N_LAYERS, 100, torch.tensor([[0] * 2 + [1] * (TINY.n_ctx - 2)]))
    ours(random_tokens(TINY, 1, TINY.n_ctx), padded)
    ours(random_tokens(TINY, 1, 2), padded)
    with pytest.raises(ValueError, match="positions that the model has"):
        ours(random_tokens(TINY, 1, 1), padded)


def test_gradients_are_refused():
    with pytest.raises(RuntimeError, match="keeps no gradients"):
        model()(random_tokens(TINY, 1, 2), KVCache(N_LAYERS, N_CTX))


@pytest.mark.parametrize("row", [[1, 0], [0, 0], [0, 1, 0, 1], [2, 2], [1, 1, 0]])
def test_padding_anywhere_else_is_refused(row: list[int]):
    with pytest.raises(ValueError, match=re.escape(f"given [{row}]")):
        left_padding(torch.tensor([row]))


@pytest.mark.parametrize("cache_class", [KVCache, StaticKVCache])
def test_the_positions_of_a_head_are_next_to_each_other_in_memory(cache_class: type[KVCache]):
    cache = cache_class(1, 9)
    cache.slots(4, torch.device("cpu"))
    cache.layers[0].append(torch.ones(2, 4, 3, 5), torch.ones(2, 4, 3, 5))
    for _ in range(2):
        for memory in (cache.layers[0].keys, cache.layers[0].values):
            assert memory.transpose(1, 2).is_contiguous()
        cache.select(torch.tensor([1, 0]))


def test_all_layers_share_one_padding_mask():
    cache = KVCache(2, 9, torch.tensor([[1, 1, 1], [0, 1, 1]]))
    first, second = (layer.mask(3) for layer in cache.layers)
    assert first is second
    cache.advance(3)
    later = cache.layers[0].mask(1)
    cache.select(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].mask(1), later.flip(0))
    assert not torch.equal(cache.layers[0].mask(1), later)
