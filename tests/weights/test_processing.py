from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.weights.processing import (
    center_unembed,
    center_writing_weights,
    fold_ln,
    fold_value_biases,
    process_weights,
    untie,
)
from clean_transformer.weights.shapes import parameter_shapes
from clean_transformer.weights.table import State

STEPS = [fold_ln, center_writing_weights, center_unembed, fold_value_biases]
FLAGS = [step.__name__ for step in STEPS]
# No two axes are of one length: the reference guesses which axis is d_model by its length.
# Every axis is long enough that the order of a sum shows in its rounding.
CFG = Config(n_layers=2, n_heads=4, d_model=40, d_head=10, d_mlp=96, d_vocab=61, n_ctx=7)
CFGS = [CFG, replace(CFG, tied_unembed=False)]
# Logits are about 10; each of their few hundred float64 roundings counts 1e-16 of that, or less.
ROUNDING = 1e-12
TOKENS = torch.tensor([[5, 0, 60, 17, 17, 3, 41], [1, 2, 3, 4, 5, 6, 7]])

each_step = pytest.mark.parametrize("step", STEPS, ids=FLAGS)
each_cfg = pytest.mark.parametrize("cfg", CFGS, ids=["tied", "untied"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
each_choice = pytest.mark.parametrize(
    "wanted", [FLAGS, [], *([flag] for flag in FLAGS), FLAGS[1:], FLAGS[1::2]], ids="+".join
)


def random_state(cfg: Config, dtype: torch.dtype = torch.float64, seed: int = 0) -> State:
    """Random weights, biases and gains; none of them is zero, centered or equal to one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.1 + 0.4 * torch.randn(shape, generator=generator, dtype=dtype)
        for name, shape in parameter_shapes(cfg).items()
    }


def forward(cfg: Config, state: State, tokens: Tensor) -> Tensor:
    """The logits of GPT-2, computed as in its definition."""

    def normalize(x: Tensor, ln: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + cfg.eps).sqrt()
        return x if cfg.normalization_type == "LNPre" else x * state[f"{ln}.w"] + state[f"{ln}.b"]

    def project(x: Tensor, letter: str) -> Tensor:
        W, b = state[f"{block}.attn.W_{letter}"], state[f"{block}.attn.b_{letter}"]
        return einsum(x, W, "batch pos d_model, head d_model d_head -> batch head pos d_head") + (
            rearrange(b, "head d_head -> head 1 d_head")
        )

    n_pos = tokens.shape[1]
    future = torch.ones(n_pos, n_pos, dtype=torch.bool).triu(1)
    x = state["embed.W_E"][tokens] + state["pos_embed.W_pos"][:n_pos]
    for block in (f"blocks.{layer}" for layer in range(cfg.n_layers)):
        q, k, v = (project(normalize(x, f"{block}.ln1"), letter) for letter in "QKV")
        scores = (q @ k.mT / cfg.d_head**0.5).masked_fill(future, -torch.inf)
        z, W_O = scores.softmax(-1) @ v, state[f"{block}.attn.W_O"]
        x = x + state[f"{block}.attn.b_O"]
        x = x + einsum(z, W_O, "batch head pos d_head, head d_head d_model -> batch pos d_model")
        pre = normalize(x, f"{block}.ln2") @ state[f"{block}.mlp.W_in"] + state[f"{block}.mlp.b_in"]
        post = F.gelu(pre, approximate="tanh")
        x = x + post @ state[f"{block}.mlp.W_out"] + state[f"{block}.mlp.b_out"]
    W_U = state["embed.W_E"].T if cfg.tied_unembed else state["unembed.W_U"]
    return normalize(x, "ln_final") @ W_U + state["unembed.b_U"]


def assert_equal(actual: State, expected: State) -> None:
    assert set(actual) == set(expected)
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert torch.equal(actual[name], expected[name]), name


def huggingface_model(cfg: Config, dtype: torch.dtype) -> Any:
    """A Hugging Face GPT-2 with random parameters, distributed as in `random_state`."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": cfg.d_model, "n_inner": cfg.d_mlp, "n_layer": cfg.n_layers}
    sizes |= {"n_head": cfg.n_heads, "n_positions": cfg.n_ctx, "vocab_size": cfg.d_vocab}
    config = transformers.GPT2Config(**sizes, layer_norm_epsilon=cfg.eps)
    model = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(mean=0.1, std=0.4, generator=generator)
    return model


def converted(cfg: Config, model: Any) -> State:
    """The model's weights by our names, as views with the same strides as in TransformerLens."""
    weights = {name.removeprefix("transformer."): w for name, w in model.state_dict().items()}
    state = {"embed.W_E": weights["wte.weight"], "pos_embed.W_pos": weights["wpe.weight"]}
    for layer in range(cfg.n_layers):
        here, there = f"blocks.{layer}", f"h.{layer}"
        qkv = weights[f"{there}.attn.c_attn.weight"], weights[f"{there}.attn.c_attn.bias"]
        for letter, W, b in zip("QKV", *(w.chunk(3, -1) for w in qkv), strict=True):
            W_heads = rearrange(W, "d_model (head d_head) -> head d_model d_head", head=cfg.n_heads)
            state[f"{here}.attn.W_{letter}"] = W_heads
            state[f"{here}.attn.b_{letter}"] = b.view(cfg.n_heads, cfg.d_head)
        W_O = weights[f"{there}.attn.c_proj.weight"]
        state[f"{here}.attn.W_O"] = W_O.view(cfg.n_heads, cfg.d_head, cfg.d_model)
        state[f"{here}.attn.b_O"] = weights[f"{there}.attn.c_proj.bias"]
        for ours, theirs in (("in", "c_fc"), ("out", "c_proj")):
            state[f"{here}.mlp.W_{ours}"] = weights[f"{there}.mlp.{theirs}.weight"]
            state[f"{here}.mlp.b_{ours}"] = weights[f"{there}.mlp.{theirs}.bias"]
        for ours, theirs in (("ln1", "ln_1"), ("ln2", "ln_2")):
            state[f"{here}.{ours}.w"] = weights[f"{there}.{theirs}.weight"]
            state[f"{here}.{ours}.b"] = weights[f"{there}.{theirs}.bias"]
    final = {"ln_final.w": weights["ln_f.weight"], "ln_final.b": weights["ln_f.bias"]}
    return state | final | {"unembed.b_U": weights["ln_f.bias"].new_zeros(cfg.d_vocab)}


def bridge_name(name: str) -> str:
    """The name of one of our parameters in a `TransformerBridge`'s state dict."""
    module, parameter = name.rsplit(".", 1)
    kind, _, part = parameter.partition("_")
    if module.endswith((".attn", ".mlp")):
        module = f"{module}.{part.lower()}"
    return f"{module}.{'bias' if kind == 'b' else 'weight'}"


# Equal to TransformerLens, bit for bit


@pytest.mark.reference
@each_step
@each_cfg
@each_dtype
def test_each_step_equals_its_transformer_lens_twin(
    step: Callable, cfg: Config, dtype: torch.dtype
):
    reference = pytest.importorskip("transformer_lens.weight_processing").ProcessWeights
    twin = reference.fold_layer_norm if step is fold_ln else getattr(reference, step.__name__)
    cfg, state = untie(cfg, random_state(cfg, dtype))
    expected = twin(dict(state), SimpleNamespace(**cfg.to_dict()))
    cfg, actual = step(cfg, state)
    assert_equal(actual, {name: expected[name] for name in parameter_shapes(cfg)})


@pytest.mark.reference
@each_choice
@each_cfg
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")
def test_processing_equals_what_hooked_transformer_loads(
    wanted: list[str], cfg: Config, dtype: torch.dtype
):
    module = pytest.importorskip("transformer_lens.HookedTransformer")
    sizes = {**cfg.axes(), "n_layers": cfg.n_layers, "n_heads": cfg.n_heads, "eps": cfg.eps}
    del sizes["head"]
    reference = module.HookedTransformer(
        module.HookedTransformerConfig(
            **sizes, act_fn="gelu_new", normalization_type="LN", dtype=dtype, device="cpu"
        )
    )
    flags = {flag: flag in wanted for flag in FLAGS}
    state = random_state(cfg, dtype)
    reference.load_and_process_state_dict(dict(untie(cfg, state)[1]), **flags)
    new_cfg, actual = process_weights(cfg, state, **flags)
    assert new_cfg.normalization_type == reference.cfg.normalization_type
    assert not new_cfg.tied_unembed
    expected = reference.state_dict()
    assert_equal(actual, {name: expected[name] for name in parameter_shapes(new_cfg)})


@pytest.mark.reference
@each_choice
@each_dtype
def test_processing_equals_what_transformer_bridge_processes(
    wanted: list[str], dtype: torch.dtype, tmp_path: Path
):
    bridges = pytest.importorskip("transformer_lens.model_bridge")
    model = huggingface_model(CFG, dtype)
    flags = {flag: flag in wanted for flag in FLAGS}
    _, actual = process_weights(CFG, converted(CFG, model), **flags)

    model.config.save_pretrained(tmp_path)
    bridge = bridges.TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=model, dtype=dtype, device="cpu"
    )
    bridge.process_weights(**flags)
    expected = bridge.state_dict()
    for name, tensor in actual.items():
        theirs = expected[bridge_name(name)]
        if name.endswith(("W_Q", "W_K", "W_V", "W_U")):
            tensor = tensor.mT  # an nn.Linear's weight is [out in]
        assert tensor.dtype == theirs.dtype, name
        assert torch.equal(tensor.reshape(theirs.shape), theirs), name


# Unchanged log-probabilities, whatever TransformerLens does


def test_the_reference_forward_is_gpt2s():
    model = huggingface_model(CFG, torch.float64)
    expected = model(TOKENS).logits
    torch.testing.assert_close(
        forward(CFG, converted(CFG, model), TOKENS), expected, rtol=0, atol=ROUNDING
    )


@st.composite
def architectures(draw: st.DrawFn) -> Config:
    sizes = {
        field: draw(st.integers(1, 5), label=field)
        for field in ("n_layers", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx")
    }
    # A small eps lets a LayerNorm magnify the rounding of a nearly constant input without bound.
    return Config(
        **sizes, d_model=draw(st.integers(1, 9)), tied_unembed=draw(st.booleans()), eps=1.0
    )


@given(
    cfg=architectures(),
    steps=st.lists(st.sampled_from([*STEPS, untie]), max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_steps_in_any_order_keep_the_log_probabilities(
    cfg: Config, steps: list[Callable], seed: int
):
    state = random_state(cfg, seed=seed)
    tokens = torch.arange(cfg.n_ctx)[None] % cfg.d_vocab
    expected = forward(cfg, state, tokens)
    for step in steps:
        cfg, state = step(cfg, state)
        assert {name: tuple(w.shape) for name, w in state.items()} == parameter_shapes(cfg)
    actual = forward(cfg, state, tokens)
    if center_unembed in steps:
        expected, actual = expected.log_softmax(-1), actual.log_softmax(-1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING)


@each_cfg
def test_processing_keeps_the_log_probabilities_to_float32(cfg: Config):
    state = random_state(cfg)
    expected = forward(cfg, state, TOKENS).log_softmax(-1)
    actual = forward(*process_weights(cfg, state), TOKENS).log_softmax(-1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# What each step promises besides


@each_step
@each_cfg
def test_a_step_leaves_what_it_was_given(step: Callable, cfg: Config):
    state = random_state(cfg)
    before = {name: tensor.clone() for name, tensor in state.items()}
    step(cfg, state)
    process_weights(cfg, state)
    assert_equal(state, before)


def test_the_untied_unembedding_has_its_own_memory():
    cfg, state = untie(CFG, random_state(CFG))
    assert not cfg.tied_unembed
    assert torch.equal(state["unembed.W_U"], state["embed.W_E"].T)
    state["embed.W_E"].zero_()
    assert state["unembed.W_U"].all()


def test_an_untied_unembedding_stays():
    untied = replace(CFG, tied_unembed=False)
    state = random_state(untied)
    cfg, same = untie(untied, state)
    assert cfg == untied
    assert_equal(same, state)


def test_folding_a_second_time_changes_nothing():
    once = fold_ln(CFG, random_state(CFG))
    cfg, state = fold_ln(*once)
    assert cfg == once[0]
    assert_equal(state, once[1])


@each_cfg
def test_folding_a_layer_norm_centers_what_reads_the_stream(cfg: Config):
    cfg, state = fold_ln(cfg, random_state(cfg))
    assert cfg.normalization_type == "LNPre"
    readers = [n for n in state if n.endswith(("W_Q", "W_K", "W_V", "W_in", "W_U"))]
    assert len(readers) == 4 * cfg.n_layers + 1
    for name in readers:
        assert state[name].mean(-2).abs().max() < ROUNDING, name


@each_cfg
def test_centering_the_writing_weights_centers_the_stream(cfg: Config):
    _, state = center_writing_weights(cfg, random_state(cfg))
    writers = [n for n in state if n.endswith(("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out"))]
    assert len(writers) == 4 * cfg.n_layers + 2
    for name in writers:
        assert state[name].mean(-1).abs().max() < ROUNDING, name


@each_cfg
def test_centering_the_unembedding_centers_the_logits(cfg: Config):
    logits = forward(*center_unembed(cfg, random_state(cfg)), TOKENS)
    assert logits.mean(-1).abs().max() < ROUNDING


@each_cfg
def test_folding_the_value_biases_leaves_none(cfg: Config):
    new_cfg, state = fold_value_biases(cfg, random_state(cfg))
    assert new_cfg == cfg
    for layer in range(cfg.n_layers):
        assert not state[f"blocks.{layer}.attn.b_V"].any()


def test_a_missing_parameter_is_named():
    state = random_state(CFG)
    del state["blocks.1.attn.b_O"]
    with pytest.raises(KeyError, match=r"blocks\.1\.attn\.b_O"):
        process_weights(CFG, state)
