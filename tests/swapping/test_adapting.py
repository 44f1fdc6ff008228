"""Modules that take no KV cache or no positions are adapted when they are swapped in."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clean_transformer.kv_cache import KVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.modules import Attention
from clean_transformer.swapping import swap
from clean_transformer.swapping.adapting import WithCache

from ..helpers import TINY, assert_same_function, random_model, random_tensor, random_tokens

pytestmark = pytest.mark.filterwarnings("ignore::clean_transformer.swapping.swaps.HookPointsLost")
TOKENS = random_tokens(batch=2, length=6)


class Averaging(nn.Module):
    """Attention that takes one input and no KV cache: the mean of the inputs so far."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class OwnBlock(nn.Module):
    """A block that takes no KV cache."""

    def forward(self, x: Tensor) -> Tensor:
        return x + Averaging()(x)


class ByLength(nn.Module):
    """A position embedding that takes no positions."""

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], dtype=torch.float64)
        return places[:, None].sin().expand(*tokens.shape, TINY.d_model)


OWN = {"blocks.*.attn": Averaging, "blocks.1": OwnBlock, "pos_embed": ByLength}
EVERY = pytest.mark.parametrize("pattern", OWN)


def ignoring(own: nn.Module) -> nn.Module:
    """The module, which now takes the optional arguments and ignores them."""
    forward = own.forward
    own.forward = lambda x, kv_cache=None, positions=None: forward(x)
    return own


def put(
    model: DemoTransformer, pattern: str, change: Callable[[nn.Module], nn.Module] = ignoring
) -> DemoTransformer:
    """The model with a module of one's own, which no `swap` adapted."""
    match pattern:
        case "blocks.*.attn":
            for block in model.blocks:
                block.attn = change(Averaging())
        case "blocks.1":
            model.blocks[1] = change(OwnBlock())
        case "pos_embed":
            model.pos_embed = change(ByLength())
    return model


def read_in_parts(model: DemoTransformer) -> Tensor:
    cache = KVCache(TINY.n_layers, TINY.n_ctx)
    return torch.cat([model(part, cache) for part in TOKENS.split([3, 1, 2], dim=1)], dim=1)


@EVERY
@torch.no_grad()
def test_a_swapped_in_module_reads_with_a_cache(pattern: str):
    model = random_model()
    expected = put(random_model(), pattern)(TOKENS)
    assert not torch.isclose(expected, model(TOKENS)).all()
    with swap(model, pattern, lambda *_: OWN[pattern]()):
        assert_same_function(read_in_parts(model), expected)


@EVERY
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(pattern: str):
    model = random_model()
    swap(model, pattern, lambda *_: OWN[pattern]())
    is_token = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    cache = KVCache(TINY.n_layers, TINY.n_ctx, attention_mask=is_token)
    parts = [model(TOKENS[:, :4], cache), model(TOKENS[:, 4:], cache)]
    for row, padding in enumerate([2, 0]):
        alone = model(TOKENS[row : row + 1, padding:])
        assert_same_function(torch.cat(parts, 1)[row : row + 1, padding:], alone)


@EVERY
@torch.no_grad()
def test_a_module_that_was_assigned_must_take_every_argument(pattern: str):
    model = put(random_model(), pattern, change=lambda own: own)
    argument = "positions" if pattern == "pos_embed" else "kv_cache"
    message = rf"forward\(\) got an unexpected keyword argument '{argument}'$"
    for read in (lambda model: model(TOKENS), read_in_parts):
        with pytest.raises(TypeError, match=message):
            read(model)


@EVERY
def test_the_tree_of_modules_does_not_show_that_a_module_is_adapted(pattern: str):
    model, adapted = put(random_model(), pattern), random_model()
    swap(adapted, pattern, lambda *_: OWN[pattern]())
    assert [*adapted.state_dict()] == [*model.state_dict()]
    assert [(name, type(part)) for name, part in adapted.named_modules()] == [
        (name, type(part)) for name, part in model.named_modules()
    ]


@EVERY
@torch.no_grad()
def test_a_deep_copy_is_adapted_for_itself(pattern: str):
    model = random_model()
    swapped = swap(model, pattern, lambda *_: OWN[pattern]())
    copied, expected = deepcopy(model), read_in_parts(model)
    swapped.restore()
    assert_same_function(read_in_parts(copied), expected)
    modules, copies = ({*map(id, each.modules())} for each in (model, copied))
    for part in copied.modules():
        if "forward" in vars(part):
            assert id(vars(part)["forward"].forward.__self__) in copies - modules


def test_restoring_takes_the_adaptation_away():
    model, own = random_model(), Averaging()
    before = {**vars(own)}
    swapped = swap(model, "blocks.0.attn", own)
    assert "forward" in vars(own)
    swapped.restore()
    assert vars(own) == before


@torch.no_grad()
def test_one_module_in_two_models_stays_adapted_until_it_has_left_both():
    own, models = Averaging(), (random_model(), random_model(seed=1))
    first, second = (swap(model, "blocks.0.attn", own) for model in models)
    expected = models[1](TOKENS)
    assert_same_function(read_in_parts(models[1]), expected)
    first.restore()
    assert_same_function(read_in_parts(models[1]), expected)
    second.restore()
    assert "forward" not in vars(own)


def test_modules_that_take_everything_are_left_alone():
    model, other = random_model(), random_model(seed=1)
    for pattern in ("pos_embed", "blocks.*", "blocks.*.attn"):
        with swap(model, pattern, other):
            assert not any("forward" in vars(part) for part in model.modules())


@torch.no_grad()
def test_the_module_runs_again_on_everything_so_far():
    lengths: list[int] = []

    def forward(x: Tensor) -> Tensor:
        lengths.append(x.shape[1])
        return x

    cache = KVCache(1, 8)
    for length in (3, 1, 2):
        assert (
            WithCache(forward)(torch.ones(1, length, 4), kv_cache=cache.layers[0]).shape[1]
            == length
        )
        cache.length += length
    assert lengths == [3, 4, 6]


@torch.no_grad()
def test_inputs_of_single_heads_are_stored_too():
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q + k.cumsum(1) * v).mean(2)

    inputs = [random_tensor(2, 5, 3, 4, seed=seed) for seed in range(3)]
    cache, parts = KVCache(1, 8), []
    for start, end in ((0, 3), (3, 5)):
        part = [x[:, start:end] for x in inputs]
        parts.append(WithCache(forward)(*part, kv_cache=cache.layers[0]))
        cache.length = end
    assert_same_function(torch.cat(parts, 1), forward(*inputs))


class OneInput(Attention):
    """An `Attention` whose forward takes one input, as a person may write it."""

    def forward(self, x: Tensor, kv_cache: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x, kv_cache=kv_cache)


class ThreeInputs(nn.Module):
    def forward(self, q: Tensor, key_input: Any = None, value_input: Any = None) -> Tensor:
        return q if q.ndim == 3 else (q + key_input + value_input).mean(2)


@pytest.mark.parametrize(("make", "watched"), [(OneInput, False), (ThreeInputs(), True)])
def test_inputs_of_single_heads_are_observed_only_where_attention_takes_them(make, watched: bool):
    model = random_model()
    swapped = swap(model, "blocks.0.attn", make)
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: "hook_q_input" in name)
    assert ("blocks.0.hook_q_input" in cache) is watched
    assert ("blocks.0.hook_q_input" in swapped.lost) is not watched


def test_attention_that_was_assigned_must_take_the_inputs_of_single_heads_to_be_observed_there():
    model = random_model()
    model.blocks[0].attn = Attention(TINY).double()
    _, cache = model.run_with_cache(TOKENS, names_filter=[*model.hook_dict])
    assert "blocks.0.hook_q_input" in cache
    model.blocks[0].attn = OneInput(TINY).double()
    model.run_with_cache(TOKENS)
    with pytest.raises(TypeError, match=r"OneInput\.forward"):
        model.run_with_cache(TOKENS, names_filter="blocks.0.hook_q_input")
