"""Hooks change what they say they change, and nothing else."""

import pickle
import subprocess
import sys
import threading
from contextlib import suppress
from copy import deepcopy

import pytest
import torch

from clean_transformer.hooks import HookedModule
from clean_transformer.model import DemoTransformer
from clean_transformer.swapping import SwapError, swap
from clean_transformer.variants import ReluMLP

from .helpers import TINY, random_model, random_tensor, random_tokens, unchecked_types

TOKENS = random_tokens()
POINTS = [*random_model().hook_dict]


@pytest.fixture
def model() -> DemoTransformer:
    return random_model()


def in_place(activation, hook):
    activation[:, 1] = 0.5


def replaced(activation, hook):
    changed = activation.clone()
    changed[:, 1] = 0.5
    return changed


@pytest.mark.parametrize("name", POINTS)
def test_an_edit_in_place_gives_what_a_replacement_gives(model, name: str):
    before = deepcopy(model.state_dict())
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[(name, replaced)])
    assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=[(name, in_place)]), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", POINTS)
def test_gradients_flow_through_an_edit_in_place(model, name: str):
    def gradients(edit):
        model.zero_grad()
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, edit)]).square().sum().backward()
        return {
            key: each.grad.clone()
            for key, each in model.named_parameters()
            if each.grad is not None
        }

    expected, given = gradients(replaced), gradients(in_place)
    assert expected.keys() == given.keys()
    assert all(torch.equal(given[key], value) for key, value in expected.items())


def test_writing_into_the_cache_does_not_write_into_the_model(model):
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS, names_filter=[*model.hook_dict])
        expected = logits.clone()
        for value in cache.values():
            if not value._is_view() or value.is_contiguous():
                value.fill_(7)
        cache["pos_embed"].fill_(7)
        assert torch.equal(
            model.run_with_cache(TOKENS, names_filter=[*model.hook_dict])[0], expected
        )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda z: z[:, :1],
            r"blocks\.0\.attn\.hook_z returned shape \[2, 1, 3, .*the activation has",
        ),
        (lambda z: z.half(), r"hook_z returned dtype torch\.float16"),
        (lambda z: z.to("meta"), "hook_z returned device meta"),
    ],
)
def test_a_replacement_that_does_not_fit_is_refused(model, edit, message: str):
    hooks = [("blocks.0.attn.hook_z", lambda z, hook: edit(z))]
    with pytest.raises(ValueError, match=message):
        model.run_with_hooks(TOKENS, fwd_hooks=hooks)


def test_a_replacement_that_is_no_tensor_is_refused(model):
    with pytest.raises(TypeError, match="hook_embed returned a float"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", lambda z, hook: 1.0)])


def test_a_selection_of_nothing_is_refused_before_the_run(model, monkeypatch):
    monkeypatch.setattr(model, "forward", None)
    for run, asked, message in (
        (model.run_with_cache, {"names_filter": lambda name: "patern" in name}, "no hook point"),
        (model.run_with_hooks, {"fwd_hooks": [(lambda name: False, in_place)]}, "no hook point"),
        (model.run_with_cache, {"names_filter": []}, "the list of names is empty"),
        (model.run_with_hooks, {"fwd_hooks": [([], in_place)]}, "the list of names is empty"),
    ):
        with pytest.raises(KeyError, match=message):
            run(TOKENS, **asked)


@pytest.mark.parametrize(
    "given",
    [
        ("hook_embed", in_place),
        {"hook_embed": in_place},
        [(in_place, "hook_embed")],
        [in_place],
        [("hook_embed", 0.0)],
    ],
)
def test_hooks_that_are_no_pairs_are_refused(model, given):
    for kind in ("fwd_hooks", "bwd_hooks"):
        with pytest.raises(TypeError, match="is no pair"), unchecked_types():
            model.run_with_hooks(TOKENS, **{kind: given})
    with pytest.raises(KeyError, match=r"no 'z'; did you mean \['blocks\.0\.attn\.hook_z'"):
        model.run_with_cache(TOKENS, names_filter="z")
    with pytest.raises(TypeError, match="names are 3; give a name"), unchecked_types():
        model.run_with_cache(TOKENS, names_filter=3)


def test_a_module_that_does_not_run_is_an_error_that_names_others(model):
    with pytest.raises(RuntimeError, match=r"blocks did not run.* did you mean blocks\.0 or"):
        model.run_with_cache(TOKENS, names_filter="blocks")
    with (
        pytest.raises(RuntimeError, match="hook_embed did not run"),
        model.hooks([("hook_embed", in_place)]),
    ):
        model.unembed(random_tensor(1, 1, TINY.d_model))


@pytest.mark.parametrize("path", ["", "blocks.0"])
def test_hooks_work_in_a_module_that_was_compiled(model, path: str):
    expected = model.run_with_cache(TOKENS)[1]
    patched = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.attn.hook_z", in_place)])
    compiled = model.get_submodule(path)

    def graph(*inputs, **arguments):
        raise AssertionError("the compiled graph ran, which calls no hook")

    compiled._compiled_call_impl = graph
    cache = model.run_with_cache(TOKENS)[1]
    assert all(torch.equal(cache[name], expected[name]) for name in expected)
    given = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.attn.hook_z", in_place)])
    assert torch.equal(given, patched)
    assert compiled._compiled_call_impl is graph


# In a process of its own, because the checks of types that tests have cannot be compiled.
COMPILED = """
import torch
from clean_transformer import Config, DemoTransformer

torch.manual_seed(0)
sizes = {"n_heads": 2, "d_model": 8, "d_head": 4, "d_mlp": 16, "d_vocab": 20, "n_ctx": 10}
model = DemoTransformer(Config(n_layers=2, **sizes))
tokens = torch.arange(12).view(2, 6)
expected = model.run_with_cache(tokens)[1]
hooks = [("blocks.0.attn.hook_z", lambda z, hook: z * 0)]
patched = model.run_with_hooks(tokens, fwd_hooks=hooks)
model.blocks[1].compile(backend="eager")
model.compile(backend="eager")
for _ in range(2):
    plain = model(tokens)
    cache = model.run_with_cache(tokens)[1]
    assert all(torch.equal(cache[name], expected[name]) for name in expected)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), patched)
    torch.testing.assert_close(model(tokens), plain)
"""


@pytest.mark.slow
def test_hooks_and_caches_work_after_compile():
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


def test_each_thread_has_its_own_hooks(model):
    texts = [random_tokens(seed=seed) for seed in range(4)]
    names = [f"blocks.{layer}.hook_mlp_out" for layer in (0, 1, 0, 1)]
    alone = [
        (model.run_with_hooks(text, fwd_hooks=[(name, in_place)]), model.run_with_cache(text)[1])
        for text, name in zip(texts, names, strict=True)
    ]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            hooks = [(names[number], in_place)]
            logits = model.run_with_hooks(texts[number], fwd_hooks=hooks)
            cache = model.run_with_cache(texts[number])[1]
            expected, activations = alone[number]
            if not torch.allclose(logits, expected, atol=1e-5) or any(
                not torch.allclose(cache[name], activations[name], atol=1e-5)
                for name in activations
            ):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any(module._forward_hooks for module in model.modules())


def test_a_run_inside_of_a_hook_function_is_a_run_of_its_own(model):
    other = random_tokens(seed=5)
    expected, alone = model.run_with_cache(TOKENS)[1], model.run_with_cache(other)[1]
    inner = {}

    def look(activation, hook):
        inner.update(model.run_with_cache(other)[1])

    with model.hooks([("blocks.0.hook_mlp_out", look)]):
        cache = model.run_with_cache(TOKENS)[1]
    assert all(torch.equal(cache[name], expected[name]) for name in expected)
    assert all(torch.equal(inner[name], alone[name]) for name in alone)


@pytest.mark.parametrize(
    "name", ["blocks.0.hook_mlp_in", "blocks.0.hook_resid_mid", "blocks.1.hook_q_input"]
)
def test_a_backward_hook_gets_the_gradient_of_its_own_hook_point(model, name: str):
    kept: dict[str, torch.Tensor] = {}

    def keep(activation, hook):
        kept["wanted"] = activation.requires_grad_()
        kept["wanted"].retain_grad()

    model.run_with_hooks(TOKENS, fwd_hooks=[(name, keep)]).square().sum().backward()
    seen = []
    loss = (
        model.run_with_hooks(
            TOKENS, bwd_hooks=[(name, lambda gradient, hook: seen.append((hook.name, gradient)))]
        )
        .square()
        .sum()
    )
    loss.backward()
    [(seen_name, gradient)] = seen
    assert seen_name == name
    torch.testing.assert_close(gradient, kept["wanted"].grad)


def test_a_backward_hook_edits_the_gradient(model):
    def silence(gradient, hook):
        gradient[:] = 0

    with model.hooks(bwd_hooks=[("hook_embed", silence)]):
        model(TOKENS).square().sum().backward()
    assert model.pos_embed.W_pos.grad.abs().max() > 0
    # The embedding is also the unembedding, whose gradient stays.
    seen = model.embed.W_E.grad.clone()
    model.zero_grad()
    model.run_with_hooks(
        TOKENS, fwd_hooks=[("hook_embed", lambda e, hook: e.detach())]
    ).square().sum().backward()
    torch.testing.assert_close(seen, model.embed.W_E.grad)


@torch.no_grad()
def test_a_backward_hook_without_gradients_is_refused(model):
    with pytest.raises(RuntimeError, match="needs no gradient"):
        model.run_with_hooks(TOKENS, bwd_hooks=[("hook_embed", in_place)])


def test_added_hooks_stay_until_reset(model):
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", in_place)])
    plain = model(TOKENS)
    model.add_hook("hook_embed", in_place)
    assert torch.equal(model(TOKENS), expected)
    seen = []
    model.add_hook(lambda name: name == "hook_embed", lambda _, hook: seen.append(hook.name), "bwd")
    model(TOKENS).sum().backward()
    assert seen == ["hook_embed"]
    model.reset_hooks()
    assert torch.equal(model(TOKENS), plain)


def test_a_hook_of_a_hook_point_knows_its_name_and_stays_until_reset(model):
    seen = []
    plain = model(TOKENS)
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", in_place)])
    z = model.blocks[1].attn.hook_z
    assert z.name == "blocks.1.attn.hook_z"
    z.add_hook(in_place)
    z.add_hook(lambda activation, hook: seen.append((hook.name, hook.layer())))
    model.blocks[1].run_with_cache(random_tensor(1, 2, TINY.d_model))
    assert torch.equal(model(TOKENS), expected)
    assert seen == [("blocks.1.attn.hook_z", 1)] * 2
    assert z.name == "blocks.1.attn.hook_z"
    model.reset_hooks()
    assert torch.equal(model(TOKENS), plain)


def test_hook_points_of_swapped_modules_have_names():
    model = DemoTransformer(TINY)
    with swap(model, "blocks.1.attn", type(model.blocks[1].attn)):
        assert model.blocks[1].attn.hook_z.name == "blocks.1.attn.hook_z"


def test_a_reset_leaves_the_hooks_of_a_block(model):
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", in_place)])
    with model.hooks([("hook_embed", in_place)]):
        model.reset_hooks()
        assert torch.equal(model(TOKENS), expected)


def test_a_copy_never_keeps_temporary_hooks(model):
    for copied in (deepcopy, pickle.dumps):
        with (
            pytest.raises(RuntimeError, match="hook_embed has a temporary hook"),
            model.hooks([("hook_embed", in_place)]),
        ):
            copied(model)
    model.add_hook("hook_embed", in_place)
    assert torch.equal(deepcopy(model)(TOKENS), model(TOKENS))


def test_a_module_with_hooks_is_not_swapped_out(model):
    message = r"blocks\.0\.mlp\.hook_post has a hook"
    with model.hooks([("blocks.0.mlp.hook_post", in_place)]):
        model(TOKENS)
        with pytest.raises(SwapError, match=message):
            swap(model, "blocks.*.mlp", ReluMLP)
        with swap(model, "blocks.1.mlp", ReluMLP):
            model(TOKENS)
    model.add_hook("blocks.0.mlp.hook_post", in_place)
    with pytest.raises(SwapError, match=message):
        swap(model, "blocks.0", type(model.blocks[0]))


@torch.no_grad()
def test_what_a_hook_function_keeps_is_its_own(model):
    name, kept = "blocks.0.hook_mlp_out", []

    def keep(activation, hook):
        activation[:] = 0
        kept.append(activation)

    buffer = random_tensor(*TOKENS.shape, TINY.d_model)

    def reuse(activation, hook):
        kept.append(buffer)
        return buffer

    for function in (keep, reuse):
        with model.hooks([(name, function)]):
            cache = model.run_with_cache(TOKENS)[1]
        before = cache[name].clone()
        kept[-1].fill_(5)
        assert torch.equal(cache[name], before)


def test_a_module_that_writes_into_a_captured_activation_is_refused(model):
    class InPlace(ReluMLP):
        def forward(self, x):
            pre = self.hook_pre(x @ self.W_in + self.b_in)
            return self.hook_post(pre.relu_()) @ self.W_out + self.b_out

    swap(model, "blocks.1.mlp", InPlace)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.mlp\.hook_pre was changed in place"):
        model.run_with_cache(TOKENS)
    assert model.run_with_cache(TOKENS, device="cpu")[1]["pre", 1].min() < 0
    model.run_with_cache(TOKENS, names_filter="blocks.1.mlp.hook_post")


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_writing_into_the_output_of_a_module_does_not_write_into_the_model(model, batch: int):
    before = deepcopy(model.state_dict())
    outputs: list[torch.Tensor] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(random_tokens(batch=batch))
    for output in outputs:
        with suppress(RuntimeError):  # PyTorch refuses to write into an expanded tensor.
            output[0] = 7
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    positions = model.pos_embed(random_tokens(batch=2))
    positions[0] = 7
    assert torch.equal(positions[1], model.pos_embed(random_tokens(batch=1))[0])


def test_the_layer_of_a_hook_point(model):
    layers = []
    model.run_with_hooks(
        TOKENS,
        fwd_hooks=[
            (lambda name: name.endswith("hook_z"), lambda _, hook: layers.append(hook.layer()))
        ],
    )
    assert layers == [0, 1]
    with pytest.raises(ValueError, match="'hook_embed' is in no block"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", lambda _, hook: hook.layer())])


def test_a_part_has_hooks_too():
    part: HookedModule = random_model().blocks[0]
    x = random_tensor(1, 3, TINY.d_model)
    expected = part.run_with_hooks(x, fwd_hooks=[("mlp.hook_post", replaced)])
    assert torch.equal(part.run_with_hooks(x, fwd_hooks=[("mlp.hook_post", in_place)]), expected)
