"""Other people's tools on our models: circuitsvis, nnsight, sparse autoencoders, ARENA's checks."""

import pytest
import torch
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.hooks import observed
from clean_transformer.modules import MLP, Attention, Embed, LayerNorm, PosEmbed, Unembed
from clean_transformer.parity.references.hooked_transformer import hooked_model

from .helpers import TINY, assert_same_function, needs, quietly, random_model, random_tokens

TOKENS = random_tokens()


def test_circuitsvis_draws_our_cache():
    attention = pytest.importorskip("circuitsvis.attention", reason="circuitsvis is not installed")
    _, cache = random_model().run_with_cache(TOKENS[:1], remove_batch_dim=True)
    words = [str(token) for token in TOKENS[0].tolist()]
    drawn = attention.attention_patterns(tokens=words, attention=cache["pattern", 0])
    assert "AttentionPatterns" in str(drawn)


def test_nnsight_reads_and_edits_our_hook_points():
    nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")
    model = random_model().requires_grad_(False)
    _, cache = model.run_with_cache(TOKENS)
    traced = nnsight.NNsight(model)
    with traced.trace(TOKENS):
        pattern = traced.blocks[0].attn.hook_pattern.output.save()
    assert torch.equal(pattern, cache["pattern", 0])


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


LAYERS = {
    "embed": (Embed, "tokens"),
    "pos_embed": (PosEmbed, "tokens"),
    "blocks.0.ln1": (LayerNorm, "residual"),
    "blocks.0.attn": (Attention, "residual"),
    "blocks.0.mlp": (MLP, "residual"),
    "unembed": (Unembed, "residual"),
}


@pytest.mark.parametrize("path", LAYERS)
@torch.no_grad()
def test_our_modules_pass_the_checks_of_the_arena_exercises(installed: str, path: str):
    """A student's layer gets random inputs, and the weights of HookedTransformer's layer."""
    needs("hooked", installed)
    cfg = Config(**TINY.to_dict() | {"tied_unembed": False})
    reference = quietly(hooked_model, cfg, random_model(cfg).state_dict()).get_submodule(path)
    student, kind = LAYERS[path]
    layer = student(cfg).double()
    layer.load_state_dict(reference.state_dict(), strict=False)
    x = TOKENS if kind == "tokens" else torch.randn(2, 7, cfg.d_model).double()
    theirs = reference(x, x, x) if path.endswith("attn") else reference(x)
    assert_same_function(layer(x), theirs.expand(2, -1, -1))
