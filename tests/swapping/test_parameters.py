"""What swap says of parameters, and of modules that look ahead."""

import warnings
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clean_transformer.config import Config
from clean_transformer.modules import MLP
from clean_transformer.swapping.effects import effect
from clean_transformer.swapping.loading import LayoutUnknown, WeightsNotCopied
from clean_transformer.swapping.swapped import Parameters
from clean_transformer.swapping.swaps import HookPointsLost, LooksAhead, Swap, swap, transplant
from clean_transformer.swapping.trial import SwapError

from ..helpers import TINY, random_model, random_tokens, tiny

OLD = ("W_in", "b_in", "W_out", "b_out")


def quiet(pattern: str, make, cfg: Config = TINY) -> Swap:
    with warnings.catch_warnings():
        for each in (HookPointsLost, WeightsNotCopied):
            warnings.simplefilter("ignore", each)
        return swap(random_model(cfg), pattern, make)


class Partly(nn.Module):
    """W_in has the old name and shape, b_in another shape, and `gain` another name."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.b_in = nn.Parameter(torch.ones(2))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + (x @ self.W_in).sum(-1, keepdim=True)


class NeverSet(Partly):
    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.W_Value = nn.Parameter(torch.empty(cfg.d_model, 2))

    def load_from(self, old: nn.Module) -> None:
        self.W_in.copy_(old.W_in)


class NeverSetBuffer(Partly):
    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.register_buffer("W_Value", torch.empty(cfg.d_model, 2))


def renamed(old: nn.Module, path: str) -> nn.Module:
    new = Partly(TINY).double()
    new.W_in.data.copy_(old.W_in)
    return new


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Partly, (("W_in",), ("b_in", "gain"), OLD[1:])),
        (renamed, (("W_in",), ("b_in", "gain"), OLD[1:])),
        (MLP, (OLD, (), ())),
        (lambda old, path: deepcopy(old), (OLD, (), ())),
        (nn.Identity(), ((), (), OLD)),
        (random_model(seed=1), ((), OLD, OLD)),
        (random_model(), (OLD, (), ())),
    ],
    ids=["class", "function", "same class", "copy", "module", "other model", "equal model"],
)
def test_copied_new_and_left_over(make, expected: tuple):
    [swapped] = quiet("blocks.1.mlp", make).swapped
    assert swapped.parameters == Parameters(*expected)


def test_the_report_lists_them():
    model = random_model()
    with pytest.warns(WeightsNotCopied), pytest.warns(HookPointsLost):
        swapped = swap(model, "blocks.*.mlp", Partly)
    said = "copied W_in; new b_in, gain; left over of the old b_in, W_out, b_out"
    assert said in swapped._repr_html_()
    assert said in effect(model, swapped, random_tokens())._repr_html_()


@pytest.mark.parametrize(
    "make", [NeverSet, lambda old, path: NeverSet(TINY).double(), NeverSetBuffer]
)
def test_a_weight_that_is_never_set_is_refused(make):
    before = torch.get_deterministic_debug_mode()
    with pytest.raises(
        SwapError, match=r"NeverSet\w* never sets .*W_Value, and the old .* left over"
    ):
        quiet("blocks.1.mlp", make)
    assert torch.get_deterministic_debug_mode() == before


# Layouts.


class WithLinear(nn.Module):
    """Like transformers' attention, but with `nn.Linear`, whose weight is [out, in]."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.c_attn = nn.Linear(cfg.d_model, 3 * cfg.d_model)
        self.c_proj = nn.Linear(cfg.d_model, cfg.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(x)


def test_a_square_weight_of_a_linear_is_not_taken_for_one_of_a_conv1d():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9, n_positions=4)
    )
    message = r"c_proj\.weight is \[out, in\] in WithLinear, which has an nn\.Linear, and \[in, out"
    with pytest.raises(SwapError, match=message):
        transplant(theirs, "blocks.0.attn", WithLinear)


class Transposed(nn.Module):
    """An MLP whose weights are [out, in], with our names."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.W_in = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model))
        self.W_out = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.W_in).relu(), self.W_out)


class Related(MLP):
    pass


def test_a_square_weight_whose_layout_cannot_be_seen_is_told():
    square = tiny(d_mlp=TINY.d_model)
    message = r"blocks\.0\.mlp: W_in, W_out of Transposed from MLP was copied as it is, but is squ"
    with pytest.warns(LayoutUnknown, match=message):
        quiet("blocks.0.mlp", Transposed, square)
    quiet("blocks.0.mlp", Related, square)  # a subclass, so nothing to say
    with pytest.raises(SwapError, match="no weight can be copied to Transposed from MLP"):
        quiet("blocks.0.mlp", Transposed)


# Modules that look ahead.


class Mean(nn.Module):
    """The mean of all positions, or only of those so far."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        if self.causal:
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x.mean(1, keepdim=True).expand_as(x).clone()


@pytest.mark.parametrize("path", ["blocks.1.attn", "blocks.0", "blocks.0.mlp", "ln_final"])
def test_a_module_that_looks_ahead_is_told(path: str):
    with pytest.warns(LooksAhead, match=rf"at {path} look ahead: their output at a position"):
        swapped = quiet(path, Mean(causal=False))
    assert "LOOKS AHEAD" in swapped._repr_html_()
    assert not quiet(path, Mean(causal=True)).swapped[0].looks_ahead


def test_an_embedding_that_looks_ahead():
    class Ahead(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens.flip(1)[..., None].expand(-1, -1, TINY.d_model).double()

    with pytest.warns(LooksAhead):
        quiet("embed", Ahead())


def test_dropout_does_not_look_ahead_and_leaves_the_random_numbers_as_they_are():
    model, state = random_model(), torch.random.get_rng_state()
    with pytest.warns(HookPointsLost):
        assert not swap(model, "blocks.0.attn", nn.Dropout(0.5)).swapped[0].looks_ahead
    assert torch.equal(torch.random.get_rng_state(), state)


# The first change.


class Nearly(nn.Module):
    def __init__(self, old: nn.Module, factor: float):
        super().__init__()
        self.old, self.factor = old, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.old(x) * self.factor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_no_first_change(dtype: torch.dtype):
    eps = torch.finfo(dtype).eps
    model = random_model(dtype=dtype)
    for factor, first in ((1 + eps, None), (1 + 64 * eps, "blocks.1.hook_mlp_out")):
        with pytest.warns(HookPointsLost):
            swapped = swap(
                model, "blocks.1.mlp", lambda old, path, by=factor: Nearly(deepcopy(old), by)
            )
        report = effect(model, swapped, random_tokens())
        assert (report.first_change and report.first_change.name) == first
        assert ("beyond rounding; the largest change is" in repr(report)) == (first is None)
        swapped.restore()
