import hashlib
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.weights.shapes import parameter_shapes
from clean_transformer.weights.synthetic import plain, stress

from ..helpers import GPT2, needs_gpt2

FACTS = "weight_stats.json"
TINY = Config(n_layers=3, n_heads=2, d_model=16, d_head=8, d_mlp=32, d_vocab=300, n_ctx=10)
MAKERS = pytest.mark.parametrize("make", [plain, stress])


@st.composite
def configs(draw: st.DrawFn) -> Config:
    normalization = draw(st.sampled_from(["LN", "LNPre"]))
    return Config(
        n_layers=draw(st.integers(1, 5)),
        n_heads=draw(st.integers(1, 3)),
        d_model=draw(st.integers(1, 24)),
        d_head=draw(st.integers(1, 5)),
        d_mlp=draw(st.integers(1, 9)),
        d_vocab=draw(st.integers(1, 40)),
        n_ctx=draw(st.integers(1, 6)),
        normalization_type=normalization,
        tied_unembed=normalization == "LN" and draw(st.booleans()),
    )


def digest(state: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, tensor in state.items():
        sha.update(name.encode() + tensor.numpy().astype("<f4").tobytes())
    return sha.hexdigest()


def kurtosis(values: Tensor) -> float:
    deviations = values.double() - values.double().mean()
    return float((deviations**4).mean() / (deviations**2).mean() ** 2)


# --- the same everywhere ---


@pytest.mark.parametrize(
    ("make", "pinned"),
    [
        (plain, "bef2e34f88a2a0a755cdf4629e4787c2d291f570798b6f733e524283fd5014ee"),
        (stress, "a358fea9282299b3b9eec2ea10aa0e01459c02f2b8d3eba7f14c72ccafc2fece"),
    ],
)
def test_bits_are_the_same_on_every_machine(make, pinned: str):
    # A vocabulary that takes more than one chunk of values.
    cfg = Config(n_layers=4, n_heads=2, d_model=16, d_head=8, d_mlp=64, d_vocab=5000, n_ctx=32)
    assert digest(make(cfg, seed=3)) == pinned


@MAKERS
def test_every_seed_and_every_name_has_its_own_values(make):
    first, again, other = make(TINY), make(TINY, seed=0), make(TINY, seed=1)
    assert digest(first) == digest(again)
    for name in set(first) - {"unembed.b_U"}:
        assert not torch.equal(first[name], other[name]), name
    assert not torch.equal(first["blocks.0.attn.W_Q"], first["blocks.0.attn.W_K"])
    assert not torch.equal(first["blocks.1.mlp.b_out"], first["blocks.2.mlp.b_out"])


@MAKERS
def test_a_deeper_model_has_the_same_first_block(make):
    shallow, deep = make(TINY), make(Config(**TINY.to_dict() | {"n_layers": 5}))
    for name in shallow:
        if not name.startswith(("blocks.1", "blocks.2")):
            assert torch.equal(shallow[name], deep[name]), name


# --- well-formed ---


@MAKERS
@settings(max_examples=40, deadline=None)
@given(cfg=configs())
def test_names_and_shapes_are_the_architectures(make, cfg: Config):
    state = make(cfg)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == parameter_shapes(cfg)
    assert list(state) == list(parameter_shapes(cfg))
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32, name
        # The input weights of attention have the memory order of `Attention`'s own.
        is_input = name.endswith(("attn.W_Q", "attn.W_K", "attn.W_V"))
        assert (tensor.transpose(0, 1) if is_input else tensor).is_contiguous(), name
        assert tensor.isfinite().all(), name
    assert not state["unembed.b_U"].any()


def test_lnpre_stress_has_the_gains_folded_in():
    cfg = Config(**TINY.to_dict() | {"tied_unembed": False})
    normal, folded = stress(cfg), stress(Config(**cfg.to_dict() | {"normalization_type": "LNPre"}))
    readers = {"unembed.W_U": "ln_final.w"}
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        readers |= {f"{block}.attn.W_{letter}": f"{block}.ln1.w" for letter in "QKV"}
        readers |= {f"{block}.mlp.W_in": f"{block}.ln2.w"}
    for name, tensor in folded.items():
        gain = normal[readers[name]][:, None] if name in readers else torch.tensor(1.0)
        assert torch.equal(tensor, normal[name] * gain), name


# --- statistics ---


def test_plain_is_normal_with_deviation_002():
    cfg = Config.gpt2("small", n_layers=2, d_vocab=1000, tied_unembed=False)
    for name, tensor in plain(cfg).items():
        if name == "unembed.b_U":
            continue
        count = tensor.numel()
        # Five standard errors, of the mean and of the deviation of `count` normal values.
        mean, deviation = (1.0 if name.endswith(".w") else 0.0), 0.02
        assert tensor.mean().item() == pytest.approx(mean, abs=5 * deviation / math.sqrt(count))
        assert tensor.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * count)), name
        # Twelve uniform values make a kurtosis of 2.9; its standard error is √(24 / count).
        assert kurtosis(tensor) == pytest.approx(2.9, abs=5 * math.sqrt(24 / count)), name


def test_plain_has_the_initializer_range_of_its_configuration():
    wide = plain(Config(**TINY.to_dict() | {"initializer_range": 0.5}))
    torch.testing.assert_close(wide["embed.W_E"], plain(TINY)["embed.W_E"] * 25)


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    return stress(Config.gpt2("small"))


def test_stress_gains_range_from_018_to_17(small):
    gains = {name: tensor for name, tensor in small.items() if name.endswith(".w")}
    means = {name: gain.mean().item() for name, gain in gains.items()}
    assert means["blocks.0.ln1.w"] == pytest.approx(0.18, abs=0.01)
    assert means["blocks.0.ln1.w"] == min(means.values())
    assert means["blocks.0.ln1.w"] < means["blocks.6.ln1.w"] < means["blocks.11.ln1.w"]
    assert max(gain.max().item() for gain in gains.values()) == pytest.approx(17.4)


def as_hugging_face(state: dict[str, Tensor], n_layers: int) -> dict[str, Tensor]:
    """The state dict of a `GPT2LMHeadModel`: attention's heads side by side, weights [in, out]."""
    ours = {
        "wte.weight": state["embed.W_E"],
        "wpe.weight": state["pos_embed.W_pos"],
        "ln_f.weight": state["ln_final.w"],
        "ln_f.bias": state["ln_final.b"],
    }
    for layer in range(n_layers):
        block = {
            name.removeprefix(f"blocks.{layer}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"blocks.{layer}.")
        }
        matrices = [block[f"attn.W_{letter}"].transpose(0, 1).flatten(1) for letter in "QKV"]
        theirs = {
            "ln_1.weight": block["ln1.w"],
            "ln_1.bias": block["ln1.b"],
            "attn.c_attn.weight": torch.cat(matrices, dim=1),
            "attn.c_attn.bias": torch.cat(
                [block[f"attn.b_{letter}"].flatten() for letter in "QKV"]
            ),
            "attn.c_proj.weight": block["attn.W_O"].flatten(0, 1),
            "attn.c_proj.bias": block["attn.b_O"],
            "ln_2.weight": block["ln2.w"],
            "ln_2.bias": block["ln2.b"],
            "mlp.c_fc.weight": block["mlp.W_in"],
            "mlp.c_fc.bias": block["mlp.b_in"],
            "mlp.c_proj.weight": block["mlp.W_out"],
            "mlp.c_proj.bias": block["mlp.b_out"],
        }
        ours |= {f"h.{layer}.{name}": tensor for name, tensor in theirs.items()}
    return ours


@needs_gpt2(FACTS)
def test_stress_has_the_statistics_of_the_published_tensors(small):
    ours = as_hugging_face(small, n_layers=12)
    facts = json.loads((GPT2 / FACTS).read_text())
    assert len(facts) == 12 * 10 + 3
    ours["h.2.mlp.c_fc.bias"] = ours["h.2.mlp.c_fc.bias"][1:]  # without the planted threshold
    for name, fact in facts.items():
        tensor = ours[name]
        # One spread serves all the blocks between the first and the last, so factors are generous.
        assert 1 / 2 < tensor.std().item() / fact["std"] < 2, name
        if name.startswith(("h.0.ln", "h.11.ln", "ln_f")) and name.endswith("weight"):
            assert 9 / 10 < tensor.mean().item() / fact["mean"] < 10 / 9, name
        elif name.endswith("bias"):
            assert abs(tensor.mean().item() - fact["mean"]) < max(0.05, fact["std"] / 2), name
        # A vector of 768 has three outliers, of random size: only the order of its tail is known.
        assert 1 / 10 < tensor.abs().max().item() / fact["absmax"] < 10, name
        if name.startswith(("h.0.attn", "h.11.attn", "wpe")) and tensor.dim() == 2:
            assert tensor.std().item() == pytest.approx(fact["std"], rel=0.05), name
            assert 2 / 3 < tensor.abs().max().item() / fact["absmax"] < 3 / 2, name
            assert 4 / 5 < kurtosis(tensor) / fact["kurtosis"] < 5 / 4, name


# --- the residual stream ---


def residual_stream(cfg: Config, state: dict[str, Tensor], n_tokens: int):
    """Run Hugging Face's GPT-2 on these weights: each block's output, all patterns, the logits."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=cfg.n_layers,
                n_head=cfg.n_heads,
                n_embd=cfg.d_model,
                n_inner=cfg.d_mlp,
                vocab_size=cfg.d_vocab,
                n_positions=cfg.n_ctx,
                bos_token_id=0,
                eos_token_id=0,
                attn_implementation="eager",
            )
        )
    weights = as_hugging_face(state, cfg.n_layers)
    model.transformer.load_state_dict(weights, assign=True)
    model.tie_weights()
    outputs: list[Tensor] = []
    for block in model.transformer.h:
        block.register_forward_hook(
            lambda _module, _args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    tokens = torch.arange(1, n_tokens + 1)[None] * 7919 % cfg.d_vocab
    with torch.no_grad():
        out = model.eval()(tokens, output_attentions=True)
    return [output.reshape(n_tokens, -1) for output in outputs], out.attentions, out.logits


def test_stress_is_as_hard_as_gpt2_small(small):
    cfg = Config.gpt2("small")
    residual, patterns, logits = residual_stream(cfg, small, n_tokens=64)
    for layer, stream in enumerate(residual):
        magnitudes = stream[0].abs()
        expected = [] if layer < 2 else [192, 384, 576]
        assert (magnitudes > 1000).nonzero().flatten().tolist() == expected, layer
        assert magnitudes.max() < 10_000
        assert 0.3 < magnitudes.median() < 7
        assert 0.3 < stream[1:].abs().median() < 7
        assert stream[1:].abs().max() < 100
    # Entropy of what each query of the second half attends to, as a part of the largest possible.
    queries = torch.arange(32, 64)
    pattern = torch.cat(patterns)[:, :, queries].double()
    entropy = -(pattern * pattern.clamp_min(1e-30).log()).sum(-1) / (queries + 1).log()
    heads = entropy.mean(-1).flatten()
    assert (heads < 0.3).double().mean() > 0.1  # some look at one place
    assert (heads > 0.7).double().mean() > 0.3  # and more look around
    assert 0.2 < torch.cat(patterns[3:])[:, :, queries, 0].mean() < 0.7
    assert 1 < logits.std() < 30


@pytest.mark.parametrize(("n_layers", "d_model"), [(1, 32), (2, 64), (3, 32), (5, 64), (3, 1600)])
def test_stress_has_the_massive_activation_at_every_size(n_layers: int, d_model: int):
    widths = {"d_model": d_model, "d_head": d_model // 2, "d_mlp": 4 * d_model, "n_ctx": 64}
    cfg = Config(**TINY.to_dict() | widths | {"n_layers": n_layers})
    residual, _, logits = residual_stream(cfg, stress(cfg), n_tokens=64)
    assert 1 < logits.std() < 30
    for layer, stream in enumerate(residual):
        coordinates = [d_model // 4, d_model // 2, 3 * d_model // 4]
        planted = coordinates if layer >= min(2, n_layers - 1) else []
        assert (stream.abs() > 1000).nonzero().tolist() == [[0, each] for each in planted], layer
        assert 0.3 < stream.abs().median() < 7, layer
