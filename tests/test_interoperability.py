"""Other people's tools on our models: circuitsvis, nnsight, sparse autoencoders, ARENA's checks."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.hooks import HookPoint, observed
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
from clean_transformer.parity.references.hooked_transformer import hooked_model
from clean_transformer.parity.references.huggingface import gpt2_lm_head_model
from clean_transformer.parity.references.transformer_bridge import bridge_around

from .helpers import TINY, assert_same_function, quietly, random_model, random_tokens

TOKENS = random_tokens()


def test_circuitsvis_draws_our_cache():
    attention = pytest.importorskip("circuitsvis.attention", reason="circuitsvis is not installed")
    _, cache = random_model().run_with_cache(TOKENS[:1], remove_batch_dim=True)
    words = [str(token) for token in TOKENS[0].tolist()]
    drawn = attention.attention_patterns(tokens=words, attention=cache["pattern", 0])
    assert "AttentionPatterns" in str(drawn)


def without_head_1(z: Tensor, hook: HookPoint) -> None:
    z[:, :, 1] = 0


def test_nnsight_reads_and_edits_our_hook_points():
    nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")
    model = random_model().requires_grad_(False)
    _, cache = model.run_with_cache(TOKENS)
    traced = nnsight.NNsight(model)
    with traced.trace(TOKENS):
        pattern = traced.blocks[0].attn.hook_pattern.output.save()
    # nnsight replaces the forward of every hook point, so that all the steps between them are run.
    # Without it, some of them are one operation, which may round otherwise.
    assert_same_function(pattern, cache["pattern", 0])

    name = "blocks.0.attn.hook_z"
    with traced.trace(TOKENS):
        traced.blocks[0].attn.hook_z.output[:, :, 1] = 0
        edited = traced.output.save()
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[(name, without_head_1)])
    assert_same_function(edited, expected)


@pytest.mark.parametrize("name", ["attn.hook_pattern", "attn.hook_result", "ln1.hook_scale"])
def test_a_hook_point_whose_forward_is_replaced_is_observed(name: str):
    # As nnsight does, to read and edit what a module returns.
    model, seen = random_model(), []
    point = model.blocks[0].get_submodule(name)
    expected = model.run_with_cache(TOKENS, names_filter=f"blocks.0.{name}")[1]
    assert not observed(point)
    point.forward = lambda activation: seen.append(activation) or activation
    assert observed(point)
    model(TOKENS)
    assert torch.equal(seen[0], expected[f"blocks.0.{name}"])


def test_a_sparse_autoencoder_goes_in_with_hooks():
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(TINY.d_model, 40).double()
            self.decoder = nn.Linear(40, TINY.d_model).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(self.encoder(x).relu())

    model, sae = random_model(), Sparse()
    name = "blocks.0.hook_resid_post"
    hooks = [(name, lambda activation, hook: sae(activation))]
    logits = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    _, cache = model.run_with_cache(TOKENS)
    expected = model.unembed(model.ln_final(model.blocks[1](sae(cache[name]))))
    assert_same_function(logits, expected)


@dataclass
class ArenaConfig:
    """The fields that the `Config` of ARENA's exercises has, with other values."""

    d_model: int = TINY.d_model
    debug: bool = True
    layer_norm_eps: float = 0.1
    d_vocab: int = TINY.d_vocab
    init_range: float = 0.5
    n_ctx: int = TINY.n_ctx
    d_head: int = TINY.d_head
    d_mlp: int = TINY.d_mlp
    n_heads: int = TINY.n_heads
    n_layers: int = TINY.n_layers


LAYERS: dict[str, Any] = {
    "embed": Embed,
    "pos_embed": PosEmbed,
    "ln_final": LayerNorm,
    "blocks.0.ln1": LayerNorm,
    "blocks.0.attn": Attention,
    "blocks.0.mlp": MLP,
    "blocks.1": TransformerBlock,
    "unembed": Unembed,
    "": DemoTransformer,
}
READ_TOKENS = ("embed", "pos_embed", "")


@pytest.mark.parametrize("path", LAYERS)
@torch.no_grad()
def test_our_modules_pass_the_checks_of_the_arena_exercises(installed: str, path: str):
    """A student's layer gets ARENA's `Config`, random inputs, and the reference layer's weights."""
    arena, cfg = ArenaConfig(), Config.of(ArenaConfig())
    layer = LAYERS[path](arena).double()
    x = TOKENS if path in READ_TOKENS else torch.randn(*TOKENS.shape, cfg.d_model).double()
    assert layer(x).shape[:2] == TOKENS.shape

    random = random_model(cfg)
    if installed not in ("hooked", "bridge"):
        pytest.skip("transformer_lens is not installed")
    if installed == "hooked":
        reference = quietly(hooked_model, cfg, random.state_dict()).get_submodule(path)
        weights = reference.state_dict()
    else:
        hf_model = gpt2_lm_head_model(cfg, random.state_dict())
        bridge = quietly(bridge_around, hf_model, "cpu", torch.float64)
        reference = bridge.get_submodule(path)
        # The bridge's weights have Hugging Face's names.
        ours = DemoTransformer.from_state_dict(bridge.state_dict(), cfg)
        weights = ours.get_submodule(path).state_dict()
    unused = layer.load_state_dict(weights, strict=False)
    assert not unused.missing_keys

    if path.endswith("attn") and installed == "hooked":
        theirs = reference(x, x, x)
    elif path == "pos_embed" and installed == "bridge":
        theirs = reference(torch.arange(x.shape[1])[None])
    else:
        theirs = reference(x)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert_same_function(layer(x), theirs.expand(len(x), -1, -1))


def test_a_config_of_another_architecture_is_refused():
    assert Config.of(TINY) is TINY
    other = ArenaConfig()
    other.act_fn = "relu"
    with pytest.raises(ValueError, match=r"ArenaConfig.act_fn is 'relu'; it must be 'gelu_new'"):
        MLP(other)
    with pytest.raises(TypeError, match="'int' is no Config: it has no n_layers"):
        DemoTransformer(7)
