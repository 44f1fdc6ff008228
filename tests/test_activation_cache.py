import pytest
import torch
import torch.nn.functional as F

from clean_transformer.activation_cache import ActivationCache
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.attention import Attention
from clean_transformer.support.selection import PER_HEAD

from .helpers import TINY, random_model, random_tensor, random_tokens, tiny

BLOCK_POINTS = [
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_in",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
]
# In the order of the forward pass.
POINTS = [
    "hook_embed",
    "hook_pos_embed",
    *(f"blocks.{layer}.{point}" for layer in range(TINY.n_layers) for point in BLOCK_POINTS),
    "ln_final.hook_scale",
    "ln_final.hook_normalized",
    "unembed.hook_in",
    "unembed.hook_out",
]
TOKENS = random_tokens()


@pytest.fixture
def model() -> DemoTransformer:
    return random_model()


@pytest.fixture
def cache(model: DemoTransformer) -> ActivationCache:
    return model.run_with_cache(TOKENS)[1]


def hook_counts(model: DemoTransformer) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


# What is captured.


def test_every_point_is_cached_in_the_order_of_the_forward_pass(cache):
    assert [*cache] == POINTS
    assert len(cache) == len(POINTS)


def test_watching_does_not_change_the_logits(model):
    # The explicit path and the fused kernel round differently: 1e-12 as in assert_same_function.
    logits, cache = model.run_with_cache(TOKENS)
    torch.testing.assert_close(logits, model(TOKENS), rtol=0, atol=1e-12)
    assert torch.equal(cache["unembed.hook_out"], logits)


def test_activations_are_detached(cache):
    assert not any(value.requires_grad for value in cache.values())


@pytest.mark.parametrize("point", PER_HEAD)
def test_per_head_points_are_captured_only_when_asked_for(model, cache, point: str):
    assert not any(name.endswith(point) for name in cache)
    name = next(name for name in model.hook_dict if name.endswith(point))
    _, asked = model.run_with_cache(TOKENS, names_filter=name)
    assert [*asked] == [name]
    assert asked[name].shape == (*TOKENS.shape, TINY.n_heads, TINY.d_model)


def test_names_may_be_one_or_several_or_a_predicate(model, cache):
    one = model.run_with_cache(TOKENS, names_filter="hook_embed")[1]
    several = model.run_with_cache(TOKENS, names_filter=["hook_embed", "blocks.1.hook_resid_mid"])[
        1
    ]
    chosen = model.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("hook_z"))[1]
    assert [*one] == ["hook_embed"]
    assert [*several] == ["hook_embed", "blocks.1.hook_resid_mid"]
    assert [*chosen] == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    assert torch.equal(one["hook_embed"], cache["hook_embed"])


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        ("hook_q", ["attn.hook_q"]),
        ("mlp", ["mlp.hook_pre", "mlp.hook_post", "hook_mlp_out"]),
        ("result", ["attn.hook_result"]),
        ("attn.hook", [f"attn.hook_{each}" for each in (*"qkv", "attn_scores", "pattern", "z")]),
        ("mlp_in", ["hook_mlp_in"]),
        ("attn_", ["attn.hook_attn_scores", "hook_attn_out"]),
        ("_input", ["hook_q_input", "hook_k_input", "hook_v_input"]),
    ],
)
def test_a_function_selects_what_needs_a_switch_only_alone(model, text, selected):
    """In TransformerLens, they are computed only after a switch was set."""
    seen = []
    keep = (
        lambda name: "blocks.0" in name and text in name,
        lambda _, hook: seen.append(hook.name),
    )
    _, cache = model.run_with_cache(TOKENS, names_filter=keep[0])
    model.run_with_hooks(TOKENS, fwd_hooks=[keep])
    assert {*cache} == {*seen} == {f"blocks.0.{name}" for name in selected}


def test_the_name_of_a_submodule_captures_its_output(model, cache):
    _, outputs = model.run_with_cache(TOKENS, names_filter="blocks.0.mlp")
    torch.testing.assert_close(outputs["blocks.0.mlp"], cache["mlp_out", 0], rtol=0, atol=1e-12)


def test_a_module_alone_has_a_cache_too():
    _, cache = Attention(TINY).run_with_cache(torch.ones(1, 2, TINY.d_model))
    assert cache["pattern"].tolist() == [[[[1.0, 0.0], [0.5, 0.5]]] * TINY.n_heads]


@pytest.mark.parametrize("run", ["run_with_cache", "run_with_hooks"])
def test_unknown_name_is_refused_before_running(model, monkeypatch, run: str):
    def fail(*_):
        raise AssertionError("it ran")

    monkeypatch.setattr(DemoTransformer, "forward", fail)
    name = "blocks.0.attn.hook_patern"
    asked = {"names_filter": name} if run == "run_with_cache" else {"fwd_hooks": [(name, print)]}
    with pytest.raises(KeyError, match=f"DemoTransformer has no '{name}'.*attn.hook_pattern"):
        getattr(model, run)(TOKENS, **asked)
    assert hook_counts(model) == 0


# How it is named.


@pytest.mark.parametrize(
    ("shorthand", "name"),
    [
        (("pattern", 0, "attn"), "blocks.0.attn.hook_pattern"),
        (("pattern", 1), "blocks.1.attn.hook_pattern"),
        (("attn", 0), "blocks.0.attn.hook_pattern"),
        (("attn_logits", 0), "blocks.0.attn.hook_attn_scores"),
        (("query", 1), "blocks.1.attn.hook_q"),
        (("key", 1), "blocks.1.attn.hook_k"),
        (("value", 1), "blocks.1.attn.hook_v"),
        (("mlp_pre", 0), "blocks.0.mlp.hook_pre"),
        (("mlp_post", 0), "blocks.0.mlp.hook_post"),
        (("post", 0, "mlp"), "blocks.0.mlp.hook_post"),
        (("resid_pre", 1), "blocks.1.hook_resid_pre"),
        (("resid_post", -1), "blocks.1.hook_resid_post"),
        (("resid_post", -2), "blocks.0.hook_resid_post"),
        (("scale", 1, "ln2"), "blocks.1.ln2.hook_scale"),
        (("normalized", "ln_final"), "ln_final.hook_normalized"),
        ("embed", "hook_embed"),
        ("hook_pos_embed", "hook_pos_embed"),
    ],
)
def test_shorthand(cache, shorthand, name: str):
    assert cache.full_name(shorthand) == name
    assert cache[shorthand] is cache[name]
    assert shorthand in cache


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (("scale", 0), r"is ambiguous; .*blocks\.0\.ln1\.hook_scale.*blocks\.0\.ln2\.hook_scale"),
        ("resid_pre", r"is ambiguous; .*blocks\.0\.hook_resid_pre.*blocks\.1\.hook_resid_pre"),
        ("hook_embedd", r"is not in the cache; .*hook_embed"),
        (("resid_pre", 2), "is not in the cache"),
        (("resid_pre", -3), "is not in the cache"),
        (("pattern", 0, "mlp"), "is not in the cache"),
        (
            ("result", -1),
            r"was not captured .* did not select 'blocks.1.attn.hook_result', or .* give its name",
        ),
        ("blocks.0.hook_q_input", "did not select 'blocks.0.hook_q_input'"),
    ],
)
def test_a_key_that_is_not_exactly_one_activation(cache, key, problem: str):
    with pytest.raises(KeyError, match=problem):
        cache[key]
    assert key not in cache


def test_layers_count_from_the_models_ends_however_few_were_captured():
    model = random_model(tiny(n_layers=12))
    names = [f"blocks.{layer}.hook_resid_pre" for layer in (0, 3, 10)]
    _, cache = model.run_with_cache(TOKENS, names_filter=names)
    for kept in (cache, cache.to("cpu")):
        assert kept.full_name(("resid_pre", 3)) == "blocks.3.hook_resid_pre"
        assert kept.full_name(("resid_pre", -2)) == "blocks.10.hook_resid_pre"
        assert ("resid_pre", -1) not in kept
        assert ("resid_pre", 12) not in kept


# What can be done with it.


def test_remove_batch_dim(model):
    logits, cache = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    _, batched = model.run_with_cache(TOKENS[:1])
    assert logits.shape == (1, TOKENS.shape[1], TINY.d_vocab)
    assert all(torch.equal(cache[name], batched[name][0]) for name in POINTS)
    assert cache.full_name(("resid_post", -1)) == "blocks.1.hook_resid_post"
    _, cache = model.run_with_cache(TOKENS[:1, :1], remove_batch_dim=True)
    assert cache.remove_batch_dim()["embed"].shape == (1, TINY.d_model)


def test_batch_dim_of_more_than_one_is_kept(cache):
    with pytest.raises(ValueError, match="the batch holds 2 inputs"):
        cache.remove_batch_dim()


def test_to_another_device(cache):
    names = [*cache]
    assert cache.to("meta") is cache
    assert [*cache] == names
    assert all(value.is_meta for value in cache.values())


def test_repr_is_short(cache):
    names = f"{POINTS[0]}, {POINTS[1]}, … {POINTS[-1]} ({len(POINTS)})"
    n_bytes = sum(value.nbytes for value in cache.values())
    assert repr(cache) == f"ActivationCache({names}; {n_bytes / 1024:.1f} KiB)"


def test_the_residual_stream_is_what_was_added_to_it(cache):
    stream, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    added = [cache["embed"] + cache["pos_embed"]]
    for layer in range(TINY.n_layers):
        added += [cache["attn_out", layer], cache["mlp_out", layer]]
    # The very additions that the model does, in its order.
    for state, steps in zip(stream, range(1, len(added) + 1), strict=True):
        assert torch.equal(state, sum(added[1:steps], added[0]))


def test_accumulated_resid_leaves_the_middle_out_by_default(cache):
    stream, labels = cache.accumulated_resid(return_labels=True)
    assert labels == ["0_pre", "1_pre", "final_post"]
    assert torch.equal(stream, cache.accumulated_resid(incl_mid=True)[::2])


# Patching.


def test_a_patched_activation_goes_on(model):
    def ablate(z: torch.Tensor, hook) -> torch.Tensor:
        return torch.zeros_like(z)

    patched = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.attn.hook_z", ablate)])
    with torch.no_grad():
        model.blocks[0].attn.W_O.zero_()
    assert torch.equal(patched, model(TOKENS))


def test_a_predicate_patches_at_every_point_it_accepts(model):
    seen = []
    model.run_with_hooks(
        TOKENS,
        fwd_hooks=[
            (lambda name: name.endswith("hook_pattern"), lambda _, hook: seen.append(hook.name))
        ],
    )
    assert seen == ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"]


def test_returning_none_changes_nothing(model):
    unchanged = model.run_with_hooks(
        TOKENS, fwd_hooks=[("hook_embed", lambda activation, hook: None)]
    )
    assert torch.equal(unchanged, model(TOKENS))


def test_changing_in_place_and_two_functions_in_order(model):
    def double(embed, hook):
        return embed * 2

    def add_one(embed, hook):
        return embed + 1

    seen = []
    hooks = [(["hook_embed"], f) for f in (double, add_one, lambda e, hook: seen.append(e))]
    model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert torch.equal(seen[0], model.embed(TOKENS) * 2 + 1)


@pytest.mark.parametrize("point", ["hook_q_input", "hook_k_input", "hook_v_input"])
def test_patching_one_heads_input_changes_that_heads_queries_only(model, point: str):
    def silence_head_1(stream, hook):
        stream = stream.clone()
        stream[:, :, 1] = 0
        return stream

    letter = point.removeprefix("hook_")[0]
    kept = {}

    def keep(activation, hook):
        kept[hook.name] = activation

    hooks = [(f"blocks.0.{point}", silence_head_1)]
    hooks += [(f"blocks.0.attn.hook_{x}", keep) for x in "qkv"]
    model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    clean = model.run_with_cache(TOKENS)[1]
    for x in "qkv":
        changed = (kept[f"blocks.0.attn.hook_{x}"] - clean[x, 0]).abs().amax(dim=(0, 1, 3)) > 1e-6
        assert changed.tolist() == [False, x == letter, False]


def test_gradients_flow_through_a_patch(model):
    patch = random_tensor(*TOKENS.shape, TINY.d_model).requires_grad_()
    model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", lambda _, hook: patch)]).sum().backward()
    assert patch.grad.abs().min() > 0


def test_hooks_are_gone_afterwards(model):
    model.run_with_cache(TOKENS)
    model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", lambda activation, hook: None)])
    assert hook_counts(model) == 0


@pytest.mark.parametrize("run", ["run_with_cache", "run_with_hooks"])
def test_hooks_are_gone_after_an_exception(model, run: str):
    too_long = torch.zeros(1, TINY.n_ctx + 1, dtype=torch.long)
    asked = {} if run == "run_with_cache" else {"fwd_hooks": [(lambda _: True, print)]}
    with pytest.raises(ValueError, match="more than the n_ctx=10"):
        getattr(model, run)(too_long, **asked)
    assert hook_counts(model) == 0


def test_other_peoples_hooks_stay(model):
    model.hook_embed.register_forward_hook(lambda module, args, output: output * 2)
    _, cache = model.run_with_cache(TOKENS)
    assert torch.equal(cache["embed"], model.embed(TOKENS) * 2)
    assert hook_counts(model) == 1


# What it costs.


@pytest.fixture
def fused_calls(monkeypatch) -> list[None]:
    calls, fused = [], F.scaled_dot_product_attention

    def count(*args, **kwargs):
        calls.append(None)
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    return calls


@pytest.mark.parametrize(
    ("watched", "fused"),
    [
        (["hook_embed"], 2),
        (["blocks.0.attn.hook_z", "blocks.1.hook_resid_pre"], 2),
        (["blocks.0.attn.hook_pattern"], 1),
        (["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"], 0),
    ],
)
def test_attention_is_fused_where_nobody_watches_it(model, fused_calls, watched, fused: int):
    model.run_with_cache(TOKENS, names_filter=watched)
    assert len(fused_calls) == fused
    model(TOKENS)
    assert len(fused_calls) == fused + TINY.n_layers
