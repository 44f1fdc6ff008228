"""When hook functions are called: in which thread, run and order, and in compiled modules."""

import threading

import pytest
import torch

from clean_transformer.hooks import HookedModule, HookPoint, observed
from clean_transformer.model import DemoTransformer

from .helpers import TINY, assert_same_function, random_model, random_tokens, unchecked_types

TOKENS = random_tokens()
POINTS = [*random_model().hook_dict]
Z = "blocks.0.attn.hook_z"
STREAM = "blocks.1.hook_resid_pre"


@pytest.fixture
def model() -> DemoTransformer:
    return random_model()


def nothing(activation, hook):
    pass


def zero(activation, hook):
    activation.zero_()


def second_position_in_place(module, inputs, output):
    output[:, 1] = 0.5


def second_position(activation, hook):
    activation[:, 1] = 0.5


@pytest.mark.parametrize("name", POINTS)
def test_a_plain_hook_that_writes_into_the_activation_changes_nothing_else(model, name: str):
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[(name, second_position)])
    with model.hook_dict[name].register_forward_hook(second_position_in_place):
        assert_same_function(model(TOKENS), expected)


@pytest.mark.parametrize("inner_run", [False, True])
@pytest.mark.parametrize("name", ["blocks.0.hook_q_input", "blocks.0.attn.hook_result"])
def test_hooks_of_another_run_do_not_change_what_is_computed(model, name: str, inner_run: bool):
    """The hooks of another thread, or of the run around this one, turn nothing on here."""
    scale, result = "blocks.0.ln1.hook_scale", {}
    expected = model.run_with_cache(TOKENS, names_filter=scale)[1][scale]

    def run(*_, **__):
        result["observed"] = observed(model.hook_dict[name])
        result["scale"] = model.run_with_cache(TOKENS, names_filter=scale)[1][scale]

    def run_elsewhere(activation, hook):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    model.run_with_hooks(TOKENS, fwd_hooks=[(name, run if inner_run else run_elsewhere)])
    assert not result["observed"]
    assert torch.equal(result["scale"], expected)


def test_hooks_for_a_gradient_are_called_in_order(model):
    def gradient(*functions):
        model.zero_grad()
        model.run_with_hooks(
            TOKENS, bwd_hooks=[(STREAM, each) for each in functions], return_type="loss"
        ).backward()
        return model.pos_embed.W_pos.grad.clone()

    def ones(gradient, hook):
        return torch.ones_like(gradient)

    def triple(gradient, hook):
        return gradient * 3

    assert_same_function(gradient(ones, triple), 3 * gradient(ones))
    assert_same_function(gradient(triple, ones), gradient(ones))


class Twice(HookedModule):
    """A module whose hook point gets its own earlier output."""

    def __init__(self):
        super().__init__()
        self.hook = HookPoint()

    def forward(self, x):
        first = self.hook(x * 2)
        return (first * 3).sum() + (self.hook(first) * 5).sum()


def test_a_hook_point_that_gets_its_own_output_has_two_gradients():
    twice, x, seen = Twice(), torch.ones(2, requires_grad=True), []

    def ten_times(gradient, hook):
        seen.append(gradient[0].item())
        return gradient * 10

    twice.run_with_hooks(x, bwd_hooks=[("hook", ten_times)]).backward()
    assert seen == [5, 53]
    assert x.grad.tolist() == [1060, 1060]


def test_an_output_with_a_hook_for_its_gradient_is_saved_as_a_tensor(model, tmp_path):
    logits = model.run_with_hooks(TOKENS, bwd_hooks=[("unembed", nothing)])
    with pytest.warns(UserWarning, match="will not be serialized"):
        torch.save(logits, tmp_path / "logits.pt")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


def test_the_two_ends_of_a_stream_are_two_hook_points(model):
    """`hook_resid_post` and the next `hook_resid_pre` pass the same tensor."""
    seen = []
    names = ["blocks.0.hook_resid_post", STREAM]
    hooks = [(name, lambda gradient, hook: seen.append(hook.name)) for name in names]
    model.run_with_hooks(TOKENS, bwd_hooks=hooks, return_type="loss").backward()
    assert seen == names[::-1]


def test_a_hook_gets_the_gradient_of_the_edited_activation(model):
    """Also if the hook was added before the edit."""
    seen = []
    hooks = {"fwd_hooks": [(Z, zero)]}
    keep = (Z, lambda gradient, hook: seen.append(gradient.clone()))
    model.run_with_hooks(TOKENS, **hooks, bwd_hooks=[keep], return_type="loss").backward()
    model.add_hook(*keep, "bwd")
    model.run_with_hooks(TOKENS, **hooks, return_type="loss").backward()
    assert seen[0].abs().sum() > 0
    assert torch.equal(*seen)


def test_a_hook_that_was_added_is_called_in_every_run(model):
    """Also if a hook function adds it, or runs the model; but not in a run that it makes itself."""
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[(STREAM, zero)])
    plain, inner = model(TOKENS), []
    model.run_with_hooks(
        TOKENS, fwd_hooks=[("hook_embed", lambda _, hook: model.add_hook(STREAM, zero))]
    )
    assert torch.equal(model(TOKENS), expected)
    model.run_with_hooks(
        TOKENS, fwd_hooks=[("hook_embed", lambda _, hook: inner.append(model(TOKENS)))]
    )
    assert torch.equal(inner[0], expected)
    model.reset_hooks()
    model.add_hook(STREAM, lambda _, hook: inner.append(model(TOKENS)))
    model.add_hook(STREAM, lambda _, hook: inner.append(model(TOKENS)))
    model(TOKENS)
    assert len(inner) == 3
    assert torch.equal(inner[1], plain)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["ln_final", "ln_final.hook_normalized", "unembed.hook_in", "unembed.hook_out"]
)
def test_hooks_around_generate_get_every_position_of_the_prompt(model, name: str):
    shapes = []
    with model.hooks([(name, lambda activation, hook: shapes.append(activation.shape[:2]))]):
        model.generate(TOKENS, 2)
    assert shapes == [TOKENS.shape, (len(TOKENS), 1)]


@torch.no_grad()
def test_an_edit_around_generate_is_the_edit_of_the_models_own_run(model):
    def flipped(activation, hook):
        activation[:, 0] = activation[:, 0].flip(-1)

    with model.hooks([("ln_final.hook_normalized", flipped)]):
        after = model(TOKENS)[:, -1].argmax(dim=-1)
        assert torch.equal(model.generate(TOKENS, 1)[:, -1], after)
        only = model(TOKENS, last_only=True)
    assert only.shape == (len(TOKENS), 1, TINY.d_vocab)


@pytest.mark.parametrize("path", ["", "blocks.0"])
def test_a_hook_is_not_added_to_a_compiled_module(model, path: str):
    """Its graph would not call the hook. The hooks of a `with` block set the graph aside."""
    part, block = model.get_submodule(path), model.blocks[0]
    part.compile(backend="eager")
    for add in (
        lambda: model.add_hook(Z, zero),
        lambda: block.add_hook("attn.hook_z", zero),
        lambda: model.hook_dict[Z].add_hook(zero),
    ):
        with pytest.raises(RuntimeError, match=r"hook_z is in a \w+ that was compiled with comp"):
            add()
    assert not observed(model.hook_dict[Z])
    part._compiled_call_impl = None
    model.add_hook(Z, zero)
    with pytest.raises(RuntimeError, match=r"hook_z' has a hook, which compiled graphs lose"):
        part.compile(backend="eager")


def compiled_forward(model: DemoTransformer) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def compiled_block(model: DemoTransformer) -> None:
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")


@pytest.mark.parametrize("compile", [compiled_forward, compiled_block])
def test_hooks_inside_of_a_compiled_forward_are_refused(model, compile):
    compile(model)
    name = next(name for name in model.hook_dict if name.endswith("hook_z"))
    for run in (
        lambda: model.run_with_cache(TOKENS),
        lambda: model.run_with_hooks(TOKENS, fwd_hooks=[(name, zero)]),
        lambda: model.add_hook(name, zero),
    ):
        with pytest.raises(RuntimeError, match=r"in a module that was compiled with torch\.comp"):
            run()


def test_a_module_in_two_places_has_no_hooks_of_one_place(model):
    model.blocks[0] = model.blocks[1]
    for run in (
        lambda: model.run_with_cache(TOKENS),
        lambda: model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_resid_pre", nothing)]),
        lambda: model.add_hook("blocks.0.hook_resid_pre", nothing),
    ):
        with pytest.raises(RuntimeError, match="is in several places of the model"):
            run()


def test_what_is_no_hook_is_refused(model):
    with unchecked_types():
        with pytest.raises(TypeError, match="the hook for hook_embed is None; give a function"):
            model.add_hook("hook_embed", None)
        with pytest.raises(ValueError, match="dir is 'both'; it must be 'fwd' or 'bwd'"):
            model.add_hook("hook_embed", nothing, dir="both")
        with pytest.raises(TypeError, match=r"None is no pair \(names, function\)"):
            model.run_with_hooks(TOKENS, fwd_hooks=None)
        with pytest.raises(TypeError, match="names are None"):
            model.run_with_hooks(TOKENS, fwd_hooks=[(None, zero)])
        for names in ([nothing], 3, [3]):
            with pytest.raises(TypeError, match="give a name, a list of names, or a function"):
                model.run_with_cache(TOKENS, names_filter=names)
    with pytest.raises(KeyError, match=r"has no ''; such as \['hook_embed'"):
        model.run_with_cache(TOKENS, names_filter="")
    assert not any(point._forward_hooks for point in model.hook_dict.values())
