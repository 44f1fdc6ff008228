"""Our modules in other libraries' models, and theirs in ours: all twelve layers of each kind."""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.modules import (
    MLP,
    Attention,
    Embed,
    LayerNorm,
    PosEmbed,
    TransformerBlock,
    Unembed,
)
from clean_transformer.parity.references.choose import REFERENCES
from clean_transformer.swapping.swaps import HookPointsLost, swap, transplant
from clean_transformer.swapping.trial import SwapError

from ..helpers import (
    assert_same_function,
    needs,
    quietly,
    random_model,
    random_tokens,
    reference_model,
)

# TransformerBridge calls Hugging Face's model with an argument that transformers 5.24 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.past_key_values. is deprecated .* for .GPT2LMHeadModel.forward.:FutureWarning"
)

# HookedTransformer.generate asks for twice the positions that it fills.
CFG = Config(n_layers=2, n_heads=3, d_model=24, d_head=8, d_mlp=40, d_vocab=101, n_ctx=40)
OURS = random_model(CFG)
TOKENS = random_tokens(CFG, batch=2, length=9)
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
NEW_TOKENS = 8
PROMPTS = [row[mask.bool()].tolist() for row, mask in zip(TOKENS, PADDED, strict=True)]

CLASSES = {
    "embed": Embed,
    "pos_embed": PosEmbed,
    "blocks.*": TransformerBlock,
    "blocks.*.ln1": LayerNorm,
    "blocks.*.attn": Attention,
    "blocks.*.ln2": LayerNorm,
    "blocks.*.mlp": MLP,
    "ln_final": LayerNorm,
    "unembed": Unembed,
}
PATTERNS = {
    "embed": 1,
    "pos_embed": 1,
    "blocks.*": 2,
    "blocks.*.ln1": 2,
    "blocks.*.attn": 2,
    "blocks.*.ln2": 2,
    "blocks.*.mlp": 2,
    "ln_final": 1,
    "unembed": 1,
}
MODELS = ("huggingface", "huggingface-sdpa", "bridge", "hooked")


@dataclass
class Theirs:
    """Another library's model with the weights of `OURS`, and how it is used."""

    kind: str
    model: Any

    def logits(self) -> Tensor:
        output = self.model(TOKENS)
        return output if isinstance(output, Tensor) else output.logits

    def padded_logits(self) -> Tensor:
        output = self.model(TOKENS, attention_mask=PADDED)
        return (output if isinstance(output, Tensor) else output.logits)[PADDED.bool()]

    def generate(self) -> Tensor:
        greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
        if self.kind == "huggingface":
            ends = {"eos_token_id": None, "pad_token_id": 0}
            return self.model.generate(TOKENS, attention_mask=PADDED, **greedy, **ends)
        # TransformerBridge 4.3.0 loses its KV cache beside transformers 5.24: its text is another.
        cached = {"use_past_kv_cache": self.kind != "bridge"}
        return self.model.generate(TOKENS, stop_at_eos=False, verbose=False, **greedy, **cached)

    def everything_cached(self) -> dict[str, Tensor]:
        if self.kind == "huggingface":
            return {}
        return dict(self.model.run_with_cache(TOKENS)[1])


@pytest.fixture(
    scope="module",
    params=[
        # Its other attention is a kernel of the same function.
        pytest.param(kind, marks=pytest.mark.slow if kind == "huggingface-sdpa" else ())
        for kind in MODELS
    ],
)
def theirs(request: pytest.FixtureRequest, installed: str) -> Theirs:
    kind, _, attention = request.param.partition("-")
    needs(kind, installed)
    if kind == "huggingface" and installed == "hooked":
        pytest.skip("GPT2LMHeadModel is the same beside TransformerBridge, and tested there")
    model: Any = reference_model(quietly(REFERENCES[kind], CFG, OURS.state_dict()))
    if attention:
        model.set_attn_implementation(attention)
    if kind == "hooked":
        # As it is by default; the reference turns on everything that it can cache.
        for flag in ("attn_result", "split_qkv_input", "attn_in", "hook_mlp_in"):
            setattr(model.cfg, f"use_{flag}", False)
    return Theirs(kind, model)


@pytest.fixture(scope="module")
def before(theirs: Theirs) -> dict[str, Any]:
    """What their own modules make."""
    with torch.no_grad():
        return {
            name: getattr(theirs, name)()
            for name in ("logits", "padded_logits", "generate", "everything_cached")
        }


@pytest.fixture(autouse=True)
def losing_hook_points_is_no_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HookPointsLost)
        yield


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_ours_in_theirs_is_the_same_model(theirs: Theirs, before: dict[str, Any], pattern: str):
    with transplant(theirs.model, pattern, OURS) as swapped:
        assert len(swapped.paths) == PATTERNS[pattern]
        assert_same_function(theirs.logits(), before["logits"])
        assert_same_function(theirs.padded_logits(), before["padded_logits"])
        assert torch.equal(theirs.generate(), before["generate"])
    assert before["generate"].shape == (2, 9 + NEW_TOKENS)
    assert torch.equal(theirs.logits(), before["logits"])


@pytest.mark.parametrize("pattern", CLASSES)
@torch.no_grad()
def test_a_class_gets_their_weights(theirs: Theirs, before: dict[str, Any], pattern: str):
    with transplant(theirs.model, pattern, CLASSES[pattern]):
        assert_same_function(theirs.logits(), before["logits"])


@torch.no_grad()
def test_classes_one_after_another_get_the_weights_of_whatever_is_there(
    theirs: Theirs, before: dict[str, Any]
):
    with ExitStack() as swaps:
        for pattern in ("blocks.1.mlp", "unembed", "blocks.1", "unembed"):
            made = CLASSES[pattern.replace("1", "*")]
            swaps.enter_context(transplant(theirs.model, pattern, made))
        assert_same_function(theirs.logits(), before["logits"])


@pytest.mark.parametrize("pattern", CLASSES)
@torch.no_grad()
def test_a_class_copies_from_their_module_in_our_model_or_refuses(theirs: Theirs, pattern: str):
    model, path = deepcopy(OURS), pattern.replace("*", "1")
    swap(model, path, theirs.model)
    with suppress(SwapError):
        swap(model, path, CLASSES[pattern])
    assert_same_function(model(TOKENS), OURS(TOKENS))


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_their_caches_go_on_holding_all_but_what_is_told(
    theirs: Theirs, before: dict[str, Any], pattern: str
):
    with transplant(theirs.model, pattern, OURS) as swapped:
        cache = theirs.everything_cached()
    aliases = {id(theirs.model.hook_dict[name]) for name in swapped.lost}
    for name, value in before["everything_cached"].items():
        if id(theirs.model.hook_dict[name]) in aliases:
            assert name not in cache
            continue
        seen = value if not value.is_floating_point() else value.clamp(min=-1e9)
        now = cache[name] if not value.is_floating_point() else cache[name].clamp(min=-1e9)
        assert_same_function(now, seen) if seen.is_floating_point() else torch.equal(now, seen)
    # In a bridge, the three inputs of attention are one to us; a block is one module.
    expected = {"blocks.*.attn": 3, "blocks.*": 12} if theirs.kind == "bridge" else {}
    assert len(swapped.lost) == CFG.n_layers * expected.get(pattern, 0)


@torch.no_grad()
def test_their_hooks_change_what_ours_compute(theirs: Theirs, before: dict[str, Any]):
    if theirs.kind == "huggingface":
        pytest.skip("GPT2LMHeadModel has no hook points")

    def silence(activation: Tensor, hook: Any) -> Tensor:
        return activation * 0

    hooks = [
        (f"blocks.1.{name}", silence)
        for name in ("attn.hook_q", "attn.hook_pattern", "attn.hook_z", "mlp.hook_post")
    ]
    for hook in hooks:
        expected = theirs.model.run_with_hooks(TOKENS, fwd_hooks=[hook])
        with transplant(theirs.model, "blocks.1.*", OURS):
            given = theirs.model.run_with_hooks(TOKENS, fwd_hooks=[hook])
        assert_same_function(given, expected)
        assert not torch.isclose(given, before["logits"]).all()


def read(model: DemoTransformer) -> tuple[Tensor, Tensor, Tensor]:
    """At once, in two parts, and padded."""
    cache, padded = KVCache(CFG.n_layers, CFG.n_ctx), KVCache(CFG.n_layers, CFG.n_ctx, PADDED)
    parts = torch.cat([model(TOKENS[:, :5], cache), model(TOKENS[:, 5:], cache)], dim=1)
    return model(TOKENS), parts, model(TOKENS, padded)[PADDED.bool()]


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_theirs_in_ours_is_the_same_model(theirs: Theirs, pattern: str):
    expected, ids = read(OURS), OURS.generate(PROMPTS, NEW_TOKENS)
    with swap(OURS, pattern, theirs.model) as swapped:
        assert len(swapped.paths) == PATTERNS[pattern]
        for now, before in zip(read(OURS), expected, strict=True):
            assert_same_function(now, before)
        assert OURS.generate(PROMPTS, NEW_TOKENS) == ids


class Averaging(nn.Module):
    """A person's own attention, which knows of no caches, padding, or streams for each head."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


@torch.no_grad()
def test_a_module_that_knows_of_no_cache_generates_too(theirs: Theirs):
    swap(ours := random_model(CFG), "blocks.*.attn", Averaging())
    with transplant(theirs.model, "blocks.*.attn", Averaging()):
        assert_same_function(theirs.logits(), ours(TOKENS))
        generated = theirs.generate()
        padding = 3 if theirs.kind == "huggingface" else 0
        for row, start in enumerate((padding, 0)):
            alone = ours(generated[row : row + 1, start:-1])[0, 8 - start :].argmax(-1)
            assert torch.equal(generated[row, 9:], alone)


@torch.no_grad()
def test_attributes_are_those_of_the_module(theirs: Theirs):
    with transplant(theirs.model, "blocks.0.attn", OURS):
        path = "transformer.h.0.attn" if theirs.kind == "huggingface" else "blocks.0.attn"
        there: Any = theirs.model
        for name in path.split("."):
            there = there[int(name)] if name.isdigit() else getattr(there, name)
        assert there.W_Q is OURS.blocks[0].attn.W_Q
        with pytest.raises(AttributeError, match="W_nothing"):
            _ = there.W_nothing


def gradients(model: nn.Module, run: Callable[[], Tensor], weight: Tensor) -> Tensor:
    weight.grad = None
    run().square().mean().backward()
    return weight.grad


def test_gradients_reach_a_transplanted_module(theirs: Theirs):
    weight = OURS.blocks[1].mlp.W_in
    expected = gradients(OURS, lambda: OURS(TOKENS), weight)
    with transplant(theirs.model, "blocks.*.mlp", OURS):
        assert_same_function(gradients(theirs.model, theirs.logits, weight), expected)


def test_what_is_refused_says_so(theirs: Theirs):
    with pytest.raises(SwapError, match=r"'blocks\.2\.attn' matches nothing in this model of 2"):
        transplant(theirs.model, "blocks.2.attn", OURS)
    with pytest.raises(
        SwapError, match=r"blocks\.0\.attn: Linear, given .* it raised RuntimeError"
    ):
        transplant(theirs.model, "blocks.0.attn", nn.Linear(5, 5).double())
    with pytest.raises(
        SwapError,
        match=re.escape(f"swap is for a DemoTransformer, not {type(theirs.model).__name__}"),
    ):
        swap(theirs.model, "blocks.0.attn", OURS)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("act_fn", "relu"),
        ("use_attn_scale", False),
        ("positional_embedding_type", "rotary"),
        ("n_key_value_heads", 1),
        ("parallel_attn_mlp", True),
        ("attn_scale", 3.0),
    ],
)
def test_a_hooked_transformer_that_is_no_gpt2_is_refused(
    theirs: Theirs, monkeypatch: pytest.MonkeyPatch, flag: str, value: object
):
    if theirs.kind != "hooked":
        pytest.skip("the flags are those of HookedTransformer")
    monkeypatch.setattr(theirs.model.cfg, flag, value)
    with pytest.raises(ValueError, match=rf"HookedTransformerConfig\.{flag} is .*; it must be"):
        transplant(theirs.model, "blocks.*.mlp", MLP)


def test_ours_is_no_model_of_theirs():
    with pytest.raises(SwapError, match="transplant is not for DemoTransformer; transplant puts"):
        transplant(OURS, "blocks.0.attn", OURS)
