"""Public reports about files, copies, graphs, hooks and training; see `.github/REPORTS.md`."""

import copy
import gc
import io
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from clean_transformer import ActivationCache, DemoTransformer
from clean_transformer.analysis import predict
from clean_transformer.training import Training, train
from clean_transformer.training.temporary import recomputed_blocks
from clean_transformer.weights.formats.huggingface import HUGGINGFACE
from tests.helpers import (
    TINY,
    assert_same_function,
    needs_torch,
    quietly,
    random_model,
    random_tokens,
    reading_model,
    tiny,
)

SHORT = "the cat sat"


# Files and copies.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
@torch.no_grad()
def test_models_and_caches_can_be_copied(copied):
    model = reading_model()
    tokens = model.to_tokens(SHORT)
    other = copied(model)
    assert torch.equal(other(tokens), model(tokens))
    other.embed.W_E.zero_()
    assert not other.unembed.W_U.any()  # the copy is tied to itself
    assert model.unembed.W_U.any()
    assert other.tokenizer.encode(SHORT) == model.tokenizer.encode(SHORT)
    cache = model.run_with_cache(tokens)[1]
    again = copied(cache)
    assert isinstance(again, ActivationCache)
    assert torch.equal(
        again.accumulated_resid(apply_ln=True), cache.accumulated_resid(apply_ln=True)
    )
    file = io.BytesIO()
    torch.save(dict(cache), file)
    assert [*torch.load(io.BytesIO(file.getvalue()), weights_only=True)] == [*cache]


@pytest.mark.parametrize("prefix", ["", "module.", "_module.module.", "lm.model.", "student."])
@pytest.mark.parametrize("base", [True, False])
def test_old_buffers_and_names_of_attributes(prefix: str, base: bool):
    model = random_model(dtype=torch.float32)
    state = dict(HUGGINGFACE.write(TINY, model.state_dict()))
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 10, 10, dtype=torch.uint8)
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    theirs = {
        prefix + (key.removeprefix("transformer.") if base else key): state[key] for key in state
    }
    loaded = DemoTransformer.from_state_dict(theirs, TINY)
    assert torch.equal(loaded(random_tokens()), model(random_tokens()))
    parallel = nn.DataParallel(model)
    loaded = DemoTransformer.from_state_dict(parallel.state_dict(), TINY)
    assert torch.equal(loaded(random_tokens()), parallel(random_tokens()))


def test_a_folder_without_lm_head_or_metadata(tmp_path: Path):
    model = reading_model(d_vocab=272, b_U=False)  # two tokens more than the tokenizer has
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in opened.keys()  # noqa: SIM118
    save_file(load_file(file), file)
    loaded = DemoTransformer.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(loaded(SHORT), model(SHORT))


# Graphs.


@needs_torch("2.6", "torch.export has no Dim.AUTO")
def test_export_and_trace():
    model, other = random_model(tiny(n_layers=1)), random_tokens(batch=3, length=5)
    sizes = {"tokens": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    exported = torch.export.export(model, (random_tokens(),), dynamic_shapes=sizes).module()
    assert_same_function(exported(other), model(other))
    with pytest.raises(IndexError):
        exported(other + 99)
    traced = quietly(torch.jit.trace, model, (random_tokens(),))
    assert_same_function(traced(other), model(other))


def test_a_model_on_the_meta_device_has_shapes():
    model = random_model().to("meta")
    assert model(random_tokens().to("meta")).shape == (2, 7, 31)


@needs_torch("2.6", "a number cannot be read under another default device")
def test_pytorchs_default_device_is_not_the_models(tmp_path: Path):
    model = reading_model(b_U=False)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        loaded = DemoTransformer.from_pretrained(tmp_path, device="cpu")
        texts = loaded.generate(
            [SHORT, "a cat"], 4, temperature=1.0, repetition_penalty=1.2, seed=0
        )
        assert loaded.generate([SHORT, "a"], 3, beams=2) == model.generate([SHORT, "a"], 3, beams=2)
        assert torch.equal(loaded([[1, 2]]), model([[1, 2]]))
        assert loaded.tokenizer([SHORT], return_tensors="pt").input_ids.device.type == "cpu"
        assert not predict(loaded, SHORT).losses.is_meta
    assert texts == model.generate(
        [SHORT, "a cat"], 4, temperature=1.0, repetition_penalty=1.2, seed=0
    )


# Attributes and hooks.


def test_hasattr_is_false_for_what_a_model_lacks():
    model = random_model()
    assert getattr(model, "tokenizer", None) is None
    with pytest.raises(ValueError, match="this model came without a tokenizer"):
        model("text")
    model.blocks[0].attn = nn.Identity()
    assert not hasattr(model, "W_Q")
    for kind in (AttributeError, ValueError):
        with pytest.raises(kind, match=r"blocks\.0\.attn is a Identity, which has no W_Q"):
            _ = model.W_Q


def n_hooks(model: nn.Module) -> int:
    return sum(
        len(each._forward_hooks) + len(each._backward_hooks) + len(each._backward_pre_hooks)
        for each in model.modules()
    )


def test_hooks_are_removed_whatever_happens():
    model, tokens, seen = random_model(), random_tokens(), []
    with pytest.raises(IndexError):
        model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda a, hook: a[:, 99])])
    with model.hooks(bwd_hooks=[(lambda name: "resid" in name, lambda g, hook: seen.append(hook))]):
        model(tokens).sum().backward()
    assert len(seen) == 6
    with pytest.raises(ZeroDivisionError), model.hooks([("hook_embed", lambda a, hook: 1 / 0)]):
        model(tokens)
    assert n_hooks(model) == 0


@pytest.mark.parametrize(
    "name", ["attn.hook_result", "hook_mlp_in", "hook_attn_in", "hook_q_input"]
)
def test_every_hook_point_that_is_named_runs(name: str):
    model, tokens, seen = random_model(), random_tokens(), []
    model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.0.{name}", lambda a, hook: seen.append(a))])
    assert len(seen) == 1
    assert [*model.run_with_cache(tokens, names_filter=f"blocks.0.{name}")[1]] == [
        f"blocks.0.{name}"
    ]


@pytest.mark.parametrize("argument", ["incl_bwd", "pos_slice"])
def test_no_argument_of_run_with_cache_is_ignored(argument: str):
    with pytest.raises(TypeError, match=f"run_with_cache.. takes no argument '{argument}': "):
        random_model().run_with_cache(random_tokens(), **{argument: True})


@pytest.mark.parametrize("argument", ["has_batch_dim", "batch_slice", "tokns"])
def test_no_argument_of_a_stack_is_ignored(argument: str):
    cache = random_model().run_with_cache(random_tokens())[1]
    with pytest.raises(TypeError, match=rf"^logit_attrs\(\) .*argument '{argument}'"):
        cache.logit_attrs(cache.decompose_resid(), tokens=5, **{argument: 1})


@torch.no_grad()
def test_components_add_up_to_the_logits():
    model, tokens = random_model(b_U=True), random_tokens()
    logits, cache = model.run_with_cache(tokens)
    assert_same_function(cache.accumulated_resid(apply_ln=True)[-1] @ model.W_U + model.b_U, logits)
    stack, labels = cache.get_full_resid_decomposition(return_labels=True, expand_neurons=False)
    assert_same_function(stack.sum(0), cache["resid_post", -1])
    assert labels[-3:] == ["embed", "pos_embed", "bias"]


@torch.no_grad()
def test_stacked_weights_are_never_stale():
    model = random_model()
    before = model.W_Q
    model.blocks[0].attn.W_Q.mul_(2)
    assert torch.equal(model.W_Q[0], 2 * before[0])


@pytest.mark.parametrize("use", ["run_with_cache", "hooks", "generate"])
def test_a_model_that_nobody_holds_is_freed(use: str):
    model = reading_model()
    if use == "run_with_cache":
        model.run_with_cache(SHORT)
    elif use == "generate":
        model.generate(SHORT, 2)
    else:
        model.run_with_hooks(SHORT, fwd_hooks=[("hook_embed", lambda a, hook: None)])
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None


# Training.


def test_float16_weights_are_not_trained(tmp_path: Path):
    model = random_model(tiny(n_layers=1), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"embed\.W_E is in float16, in which AdamW's eps"):
        train(model, [*range(31)], tmp_path / "run", Training(steps=2, batch=1), device="cpu")
    assert not (tmp_path / "run").exists()


def test_gradient_checkpointing_changes_no_gradient():
    plain, recomputed, tokens = random_model(), random_model(), random_tokens()
    plain(tokens).square().sum().backward()
    with recomputed_blocks(recomputed):
        recomputed(tokens).square().sum().backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert_same_function(one.grad, other.grad)
