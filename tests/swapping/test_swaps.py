import re
import subprocess
import sys
import warnings
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.modules import (
    MLP,
    Attention,
    Embed,
    LayerNorm,
    PosEmbed,
    TransformerBlock,
    Unembed,
)
from clean_transformer.modules.contract import kind, parts
from clean_transformer.swapping.loading import WeightsNotCopied
from clean_transformer.swapping.swaps import HookPointsLost, Swap, swap
from clean_transformer.swapping.trial import SwapError

from ..helpers import TINY, assert_same_function, random_model, random_tokens, unchecked_types

TOKENS = random_tokens()
EVERY_PART = [*parts(TINY.n_layers)]


class ReluMLP(nn.Module):
    """As a person writes one: no hook points, and no output bias."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.W_in = nn.Parameter(torch.zeros(cfg.d_model, cfg.d_mlp))
        self.W_out = nn.Parameter(torch.zeros(cfg.d_mlp, cfg.d_model))
        self.b_in = nn.Parameter(torch.full((cfg.d_mlp + 1,), 7.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.W_in).relu() @ self.W_out


class Giving(nn.Module):
    """Gives what it is told to, whatever it is given."""

    def __init__(self, output: object):
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> object:
        return self.output


class Nothing(nn.Module):
    def forward(self) -> None: ...


def quiet_swap(model: nn.Module, pattern: str, make) -> Swap:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HookPointsLost)
        warnings.simplefilter("ignore", WeightsNotCopied)
        return swap(model, pattern, make)


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("embed", ["embed"]),
        ("ln_final", ["ln_final"]),
        ("blocks.1", ["blocks.1"]),
        ("blocks.*", [f"blocks.{layer}" for layer in range(12)]),
        ("blocks.11.attn", ["blocks.11.attn"]),
        ("blocks.*.mlp", [f"blocks.{layer}.mlp" for layer in range(12)]),
        ("blocks.[8-10].ln2", [f"blocks.{layer}.ln2" for layer in (8, 9, 10)]),
        ("blocks.[9-99].ln1", [f"blocks.{layer}.ln1" for layer in (9, 10, 11)]),
        ("blocks.0.*", [f"blocks.0.{part}" for part in ("ln1", "attn", "ln2", "mlp")]),
        ("*", ["embed", "pos_embed", "ln_final", "unembed"]),
    ],
)
def test_patterns_match(pattern: str, paths: list[str]):
    model = random_model(Config(**{**TINY.to_dict(), "n_layers": 12}))
    assert list(swap(model, pattern, lambda old, path: deepcopy(old)).paths) == paths


@pytest.mark.parametrize("path", EVERY_PART)
@torch.no_grad()
def test_a_fresh_copy_changes_no_bit(path: str):
    model = random_model()
    unwatched = model(TOKENS)
    before, cache_before = model.run_with_cache(TOKENS)
    with swap(model, path, lambda old, path: deepcopy(old)) as swapped:
        assert swapped.lost == ()
        after, cache_after = model.run_with_cache(TOKENS)
        assert torch.equal(model(TOKENS), unwatched)
    assert torch.equal(after, before)
    assert [*cache_after] == [*cache_before]
    assert all(torch.equal(cache_after[name], cache_before[name]) for name in cache_before)


def test_a_function_sees_the_old_module_and_its_path():
    model, seen = random_model(), {}

    def make(old: nn.Module, path: str) -> nn.Module:
        seen[path] = old
        assert old.cfg == model.cfg
        return deepcopy(old)

    old = {path: model.get_submodule(path) for path in ("blocks.0.mlp", "blocks.1.mlp")}
    swap(model, "blocks.*.mlp", make)
    assert seen == old
    assert all(model.get_submodule(path) is not module for path, module in old.items())


def test_a_class_is_given_what_it_has_of_the_old_parameters():
    model = random_model()
    old = model.blocks[0].mlp
    new = quiet_swap(model.eval(), "blocks.0.mlp", ReluMLP) and model.blocks[0].mlp
    assert type(new) is ReluMLP
    assert not new.training
    for name in ("W_in", "W_out"):
        assert torch.equal(getattr(new, name), getattr(old, name))
        assert getattr(new, name) is not getattr(old, name)
    assert (new.b_in == 7).all()  # of another shape
    x = torch.ones(1, 2, TINY.d_model, dtype=torch.float64)
    assert_same_function(new(x), (x @ old.W_in).relu() @ old.W_out)


OWN_CLASSES = {
    "embed": Embed,
    "pos_embed": PosEmbed,
    "block": TransformerBlock,
    "ln1": LayerNorm,
    "attn": Attention,
    "ln2": LayerNorm,
    "mlp": MLP,
    "ln_final": LayerNorm,
    "unembed": Unembed,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("path", EVERY_PART)
@torch.no_grad()
def test_the_class_that_is_there_already_changes_no_bit(path: str, tied: bool):
    model = random_model(Config(**TINY.to_dict() | {"tied_unembed": tied}), b_U=True)
    before = model(TOKENS)
    with swap(model, path, OWN_CLASSES[kind(path)]):
        after = model(TOKENS)
    if tied and path == "unembed":
        # The new W_U has memory of its own. In another layout, sums may be rounded otherwise.
        assert_same_function(after, before)
    else:
        assert torch.equal(after, before)


def test_a_class_that_can_be_given_no_weight_is_refused():
    class Renamed(nn.Module):
        def __init__(self, cfg: Config):
            super().__init__()
            self.linear = nn.Linear(cfg.d_model, cfg.d_model)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    model, random = random_model(), random_tokens()
    before = model(random)
    message = (
        "blocks.0.mlp: no weight can be copied to Renamed from MLP.* linear.weight, linear.bias"
    )
    with pytest.raises(SwapError, match=message):
        swap(model, "blocks.*.mlp", Renamed)
    assert torch.equal(model(random), before)


def test_load_from_that_fails_is_a_swap_error():
    class Wrong(MLP):
        def load_from(self, old: nn.Module) -> None:
            self.W_in.copy_(old.c_fc)

    message = "load_from, which loads Wrong from MLP, raised AttributeError: .* 'c_fc'"
    with pytest.raises(SwapError, match=message):
        swap(random_model(), "blocks.0.mlp", Wrong)


def test_a_class_may_load_from_the_old_module_itself():
    class Halved(MLP):
        def load_from(self, old: nn.Module) -> None:
            with torch.no_grad():
                self.W_in.copy_(old.W_in / 2)

    model = random_model()
    old = model.blocks[1].mlp
    swap(model, "blocks.1.mlp", Halved)
    assert torch.equal(model.blocks[1].mlp.W_in, old.W_in / 2)
    assert (model.blocks[1].mlp.b_in == 0).all()


def test_a_module_stands_in_one_place_itself_and_in_several_as_copies():
    model, mlp = random_model(), random_model(seed=1).blocks[0].mlp
    with swap(model, "blocks.0.mlp", mlp):
        assert model.blocks[0].mlp is mlp
    with swap(model, "blocks.*.mlp", mlp):
        places = [block.mlp for block in model.blocks]
        assert len({id(each.W_in) for each in (mlp, *places)}) == 3
        assert all(torch.equal(each.W_in, mlp.W_in) for each in places)


@torch.no_grad()
def test_a_whole_model_gives_its_own_parts():
    model, other = random_model(), random_model(seed=1)
    with ExitStack() as stack:
        for pattern in ("*", "blocks.*"):
            stack.enter_context(swap(model, pattern, other))
        assert model.blocks[1] is other.blocks[1]
        assert torch.equal(model(TOKENS), other(TOKENS))
    assert not torch.equal(model(TOKENS), other(TOKENS))


class Stop(Exception):
    pass


@given(
    nest=st.lists(st.sampled_from([*EVERY_PART, "blocks.*.mlp", "blocks.[0-1]", "*"]), max_size=6),
    stops=st.booleans(),
)
def test_restoring_leaves_the_model_as_it_was(nest: list[str], stops: bool):
    model = random_model()
    handle = model.blocks[0].mlp.hook_pre.register_forward_hook(lambda *_: None)
    modules, state = [*model.named_modules()], model.state_dict()
    try:
        with ExitStack() as stack:
            for pattern in nest:
                swapped = swap(model, pattern, lambda old, path: deepcopy(old))
                stack.enter_context(swapped)
            if stops:
                raise Stop
    except Stop:
        pass
    assert [*model.named_modules()] == modules
    assert all(
        now is was for (_, now), (_, was) in zip(model.named_modules(), modules, strict=True)
    )
    assert [*model.state_dict()] == [*state]
    assert all(now.data_ptr() == state[key].data_ptr() for key, now in model.state_dict().items())
    assert [*model.blocks[0].mlp.hook_pre._forward_hooks] == [handle.id]


def test_a_swap_without_a_block_stays_until_it_is_restored():
    model = random_model()
    old, swapped = model.ln_final, swap(model, "ln_final", lambda old, path: deepcopy(old))
    assert model.ln_final is not old
    swapped.restore()
    swapped.restore()
    assert model.ln_final is old


def test_an_earlier_swap_is_not_restored_below_a_later_one():
    model = random_model()
    old = model.blocks[0].attn
    earlier = swap(model, "blocks.*.attn", lambda old, path: deepcopy(old))
    later = swap(model, "blocks.0.attn", lambda old, path: deepcopy(old))
    now = [block.attn for block in model.blocks]
    with pytest.raises(RuntimeError, match="'attn' of TransformerBlock was swapped again"):
        earlier.restore()
    assert [block.attn for block in model.blocks] == now
    later.restore()
    earlier.restore()
    assert model.blocks[0].attn is old


def test_lost_hook_points_are_told():
    model = random_model()
    message = "caches will not hold blocks.1.mlp.hook_pre, blocks.1.mlp.hook_post"
    with (
        pytest.warns(HookPointsLost, match=message),
        pytest.warns(WeightsNotCopied, match=r"no weights for blocks.1.mlp.b_in, so"),
    ):
        swapped = swap(model, "blocks.1.mlp", ReluMLP)
    assert swapped.lost == ("blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post")
    _, cache = model.run_with_cache(TOKENS)
    assert not {*swapped.lost} & {*cache}


class Plain(MLP):
    """A module that inherits hook points, and does not call them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_in + self.b_in) @ self.W_out + self.b_out


def test_hook_points_that_do_not_run_are_lost():
    model = random_model()
    with pytest.warns(HookPointsLost, match=r"not hold blocks.1.mlp.hook_pre, blocks.1.mlp.hook"):
        swapped = swap(model, "blocks.1.mlp", Plain)
    assert swapped.lost == ("blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post")
    _, cache = model.run_with_cache(TOKENS)
    with pytest.raises(KeyError, match=r"not captured .* or the module does not run it"):
        cache["post", 1]
    with torch.no_grad():
        model.blocks[1].mlp.b_out[0] = torch.nan
    with pytest.raises(RuntimeError, match=r"first NaN or infinity: blocks\.1\.hook_mlp_out at"):
        model.generate([[1, 2]], 1)


def test_a_module_with_hook_points_is_not_put_into_two_places():
    model, other = random_model(), random_model().blocks[0].mlp
    shared = r"blocks\.1\.mlp[.\w]*\.hook_pre is blocks\.0\.mlp\.hook_pre; give a copy"
    names = {path: point.name for path, point in model.hook_dict.items()}
    for pattern, make in [
        ("blocks.1.mlp", model.blocks[0].mlp),
        ("blocks.1.mlp", lambda old, path: nn.Sequential(model.blocks[0].mlp)),
        ("blocks.*.mlp", lambda old, path: other),
    ]:
        with pytest.raises(SwapError, match=shared):
            swap(model, pattern, make)
    assert names == {path: point.name for path, point in model.hook_dict.items()}
    mlps = [block.mlp for block in model.blocks]
    with swap(model, "blocks.*.mlp", lambda old, path: mlps[path == "blocks.0.mlp"]):
        assert [block.mlp for block in model.blocks] == mlps[::-1]


def test_a_cache_refuses_a_module_in_two_places():
    model = random_model()
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(RuntimeError, match=r"blocks\.0\.mlp\.hook_pre is in several places"):
        model.run_with_cache(TOKENS)


class OneStream(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_per_head_inputs_are_lost_to_attention_that_takes_one_stream():
    model = random_model()
    swapped = quiet_swap(model, "blocks.0.attn", OneStream())
    assert {f"blocks.0.hook_{name}" for name in ("attn_in", "q_input", "k_input", "v_input")} <= {
        *swapped.lost
    }
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: "hook_q_input" in name)
    assert [*cache] == ["blocks.1.hook_q_input"]


BATCH = (2, 3, TINY.d_model)
STREAM = "'batch pos d_model' [2, 3, 12]"
ASKED = f"given {STREAM}: wanted {STREAM}, torch.float64 on cpu, but"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Nothing(), f"Nothing, {ASKED} it raised TypeError: Nothing.forward() takes 1 positional"),
        (nn.Linear(5, 5), f"Linear, {ASKED} it raised RuntimeError: "),
        (Giving(torch.zeros(2, 3, 5)), f"Giving, {ASKED} it gave [2, 3, 5], torch.float32 on cpu"),
        (Giving(torch.zeros(BATCH)), f"Giving, {ASKED} it gave [2, 3, 12], torch.float32 on cpu"),
        (
            Giving(torch.zeros(BATCH, dtype=torch.float64, device="meta")),
            f"Giving, {ASKED} it gave [2, 3, 12], torch.float64 on meta",
        ),
        (Giving((torch.zeros(BATCH), None)), f"Giving, {ASKED} it gave a tuple"),
        (lambda old, path: 3, "wanted a torch.nn.Module, but make gave int"),
        ("ReluMLP", "wanted a class, a function (old, path) or a torch.nn.Module, not 'ReluMLP'"),
        (Attention(TINY), f"Attention, {ASKED} it raised RuntimeError: "),
    ],
)
def test_what_does_not_keep_the_contract_is_refused(make, message: str):
    model = random_model()
    before = [*model.modules()]
    with unchecked_types(), pytest.raises(SwapError, match=re.escape(message)) as error:
        swap(model, "blocks.1.mlp", make)
    assert str(error.value).startswith("blocks.1.mlp: ")
    assert all(now is was for now, was in zip(model.modules(), before, strict=True))


@pytest.mark.parametrize("pattern", [3, ["blocks.0.mlp"], MLP])
def test_a_pattern_that_is_no_string_is_refused(pattern):
    with unchecked_types(), pytest.raises(SwapError, match="is not a string such as"):
        swap(random_model(), pattern, MLP)


@torch.no_grad()
def test_a_function_that_changes_the_old_module_is_refused():
    def written(old, path):
        old.W_in.zero_()
        return old

    def replaced(old, path):
        old.W_in = nn.Parameter(old.W_in * 2)
        return old

    for make in (written, replaced):
        with pytest.raises(SwapError, match=r"blocks\.0\.mlp: make changed the weights of the old"):
            swap(random_model(), "blocks.0.mlp", make)
    swap(random_model(), "blocks.0.mlp", lambda old, path: written(deepcopy(old), path))


def test_one_bad_module_of_many_swaps_none():
    model = random_model()
    before = [*model.modules()]
    made = iter([deepcopy(model.blocks[0].mlp), Giving(None)])
    with pytest.raises(SwapError, match=r"blocks\.1\.mlp: Giving"):
        swap(model, "blocks.*.mlp", lambda old, path: next(made))
    assert all(now is was for now, was in zip(model.modules(), before, strict=True))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("blocks.2.attn", "blocks.0.attn"),
        ("blocks.*.atn", "attn"),
        ("blocks.[5-7].mlp", "mlp"),
        ("blocks.[1-0].mlp", "mlp"),
        ("ln_finale", "ln_final"),
        ("blocks.0.attn.hook_q", "blocks.0.attn"),
        ("blocks.0.att.", "blocks.0.attn"),
        ("", ""),
    ],
)
def test_a_pattern_without_a_match_is_refused(pattern: str, near: str):
    message = f"{re.escape(repr(pattern))} matches nothing in this model of 2 layers.*{near}"
    with pytest.raises(SwapError, match=message):
        swap(random_model(), pattern, MLP)


def test_other_models_are_refused():
    with pytest.raises(SwapError, match="swap is for a DemoTransformer, not Linear; transplant"):
        swap(nn.Linear(2, 2), "blocks.0.attn", MLP)


def test_trying_a_module_draws_no_random_numbers():
    class Dropping(nn.Dropout):
        pass

    model, before = random_model(), torch.get_rng_state()
    quiet_swap(model, "blocks.0.mlp", Dropping(0.5))
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_flow_through_swapped_modules():
    model = random_model()
    with quiet_swap(model, "blocks.*.mlp", ReluMLP):
        model(TOKENS).square().mean().backward()
        for block in model.blocks:
            assert block.mlp.W_in.grad.abs().sum() > 0
        assert model.embed.W_E.grad.abs().sum() > 0


COMPILED = """
import torch
from torch import nn
from clean_transformer import Config, DemoTransformer
from clean_transformer.swapping.loading import WeightsNotCopied
from clean_transformer.swapping.swaps import swap

class OwnMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.W_in = nn.Parameter(torch.zeros(cfg.d_model, cfg.d_mlp))
        self.W_out = nn.Parameter(torch.zeros(cfg.d_mlp, cfg.d_model))
    def forward(self, x):
        return (x @ self.W_in).relu() @ self.W_out

cfg = Config(n_layers=2, n_heads=3, d_model=12, d_head=4, d_mlp=20, d_vocab=31, n_ctx=10)
model = DemoTransformer(cfg).double()
tokens = torch.arange(14).reshape(2, 7)
swap(model, "blocks.*.mlp", OwnMLP)
compiled = torch.compile(model)
with torch.no_grad():
    expected, given = model(tokens), compiled(tokens)
    error = (expected - given).abs().max() / expected.square().mean().sqrt()
    assert error < 1e-12, error
"""


@pytest.mark.slow
def test_a_swapped_model_compiles():
    # In a process of its own: what checks types at run time cannot be compiled.
    code = [sys.executable, "-W", "ignore", "-c", COMPILED]
    done = subprocess.run(code, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_range_far_beyond_the_layers_is_cheap():
    model = random_model()
    with swap(model, "blocks.[1-999999999].mlp", lambda old, path: deepcopy(old)) as swapped:
        assert swapped.paths == ("blocks.1.mlp",)
