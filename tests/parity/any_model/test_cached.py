"""`check_model` compares what a model computes while it generates with a call without a cache."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clean_transformer.parity import check_model
from clean_transformer.parity.any_model.target import load_target
from clean_transformer.parity.faults import inject
from clean_transformer.parity.verdict import Check, Verdict

from ...helpers import quietly
from ..small import BF16, F32
from .models import is_installed, make, some_tokens


def cached(model: nn.Module) -> Check:
    [use] = [use for use in check_model(model, some_tokens()).uses if use.name == "generate"]
    assert use.cached is not None
    assert use.reason == ("" if use.cached.verdict is Verdict.PASS else use.cached.note)
    return use.cached


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["file", "ours"])
def test_a_right_cache_passes(kind: str, dtype: torch.dtype):
    found = cached(make(kind, dtype))
    assert found.verdict is Verdict.PASS, found
    assert found.measured < found.allowed / 10


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_a_wrong_cache_is_named(dtype: torch.dtype):
    model = make("ours", dtype)
    with inject("cached-positions-late"):
        report = check_model(model, some_tokens())
    assert {use.name: use.verdict for use in report.uses} == {
        "forward": Verdict.PASS,
        "backward": Verdict.PASS,
        "generate": Verdict.WRONG,
    }
    assert report.of_calls is Verdict.PASS
    reason = "token 2 of 4; the first output that differs is that of pos_embed"
    assert report.by_use[-1].reason == reason


@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["huggingface", "bridge", "hooked"])
def test_the_verdict_is_that_of_the_generated_tokens(kind: str):
    """TransformerLens's caches are wrong in some versions, so the tokens say what is right."""
    if not is_installed(kind):
        pytest.skip(f"{kind} is not installed")
    target = quietly(load_target, "demo", kind, torch.device("cpu"), None)
    model, prompt = target.model.eval(), target.inputs[:, :10]
    switch, options = "use_cache", {"max_new_tokens": 8, "do_sample": False}
    if kind != "huggingface":
        switch, options = "use_past_kv_cache", {**options, "stop_at_eos": False, "verbose": False}
    one, other = (quietly(model.generate, prompt, **options | {switch: on}) for on in (True, False))
    expected = Verdict.PASS if torch.equal(one, other) else Verdict.WRONG
    [use] = [each for each in check_model(model, target.inputs).uses if each.name == "generate"]
    assert use.cached.verdict is expected


class Text:
    """What some libraries return: not token ids."""


def read_on(model: nn.Module, ids: Tensor, part: Any) -> Tensor:
    """Generate two tokens without a cache from a part of the positions."""
    for _ in range(2):
        ids = torch.cat([ids, model(ids[:, part])[:, -1:].argmax(dim=-1)], dim=1)
    return ids


@pytest.mark.parametrize("masked", [-1e9, -torch.inf])
def test_a_masked_logit_is_no_difference_and_hides_none(masked: float):
    model = make("ours")
    with torch.no_grad():
        model.unembed.b_U[5] = masked
    assert cached(model).verdict is Verdict.PASS
    with inject("cached-positions-late"):
        assert cached(model).verdict is Verdict.WRONG


def test_a_model_that_trains_after_it_generated_is_evaluated():
    model = make("file")
    right = type(model).generate

    def generate(idx: Tensor, max_new_tokens: int) -> Tensor:
        model.eval()
        ids = right(model, idx, max_new_tokens)
        model.train()
        return ids

    model.generate = generate
    assert cached(model).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("generate", "reason"),
    [
        (lambda model, prompt: Text(), "does not return token ids [batch pos]"),
        (lambda model, prompt: prompt[0], "does not return token ids [batch pos]"),
        (lambda model, prompt: prompt[:1], "does not return token ids [batch pos]"),
        (lambda model, prompt: prompt[:, 1:], "token ids that begin with the prompt"),
        (lambda model, prompt: prompt, "returns no new tokens"),
        (lambda model, prompt: torch.cat([prompt] * 2, 1), "does not call the model once"),
        (lambda model, prompt: read_on(model, prompt, slice(-4, None)), "only a part of the text"),
        (
            lambda model, prompt: read_on(model, prompt.flip(0), ...).flip(0),
            "for the prompt differ",
        ),
    ],
    ids=[
        *("no tensor", "no batch", "fewer texts", "other tokens", "no new tokens", "no calls"),
        *("the last tokens", "in another order"),
    ],
)
def test_what_cannot_be_compared_is_not_checked(generate, reason: str):
    model = make("ours")
    model.generate = lambda idx, max_new_tokens: generate(model, idx)
    found = cached(model)
    assert found.verdict is Verdict.NOT_CHECKED
    assert reason in found.note


def test_generated_ids_that_the_model_cannot_read_are_not_checked():
    def generate(idx: Tensor, max_new_tokens: int) -> Tensor:
        for _ in range(2):
            model(idx)
        return torch.cat([idx, torch.full_like(idx[:, :2], 10**6)], dim=1)

    model = make("file")
    model.generate = generate
    found = cached(model)
    assert found.verdict is Verdict.NOT_CHECKED
    assert "the model cannot read the generated text: IndexError" in found.note
