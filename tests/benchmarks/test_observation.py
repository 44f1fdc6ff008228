"""The kinds of runs that are compared compute the same, and the table has their quotients."""

import pytest
import torch

from benchmarks import observation

from ..helpers import assert_same_function, random_model, random_tokens


def test_all_kinds_of_runs_give_the_same_logits():
    model, tokens = random_model(), random_tokens()
    kinds = observation.runs(model, tokens)
    expected = model(tokens)
    for name, run in kinds.items():
        keeps = name in (observation.CAPTURE, observation.LISTED)
        logits = run()[0] if keeps else run()
        assert_same_function(logits, expected)
    bare = observation.without_hook_points(model)
    assert not bare.hook_dict
    assert len(model.hook_dict) > 0
    assert bare.embed.W_E is model.embed.W_E


def test_plain_hooks_keep_what_a_cache_keeps():
    model, tokens = random_model(), random_tokens()
    kept = observation.keeping_a_list(model, tokens)[1]
    cache = model.run_with_cache(tokens)[1]
    for one, other in zip(kept, cache.values(), strict=True):
        assert torch.equal(one, other)
    assert not any(point._forward_hooks for point in model.hook_dict.values())


def test_the_bytes_that_a_cache_keeps():
    model, tokens = random_model(), random_tokens()
    cache = model.run_with_cache(tokens)[1]
    of_all = sum(value.nbytes for value in cache.values())
    # A residual stream that two hook points share counts once.
    assert cache["resid_pre", 0].nbytes < observation.bytes_kept(model, tokens) < of_all


def test_the_table_has_the_median_of_the_quotients(capsys: pytest.CaptureFixture[str]):
    """The first quotient counts the system's time, and the last one leaves it out."""
    taken = observation.measure(random_model(), random_tokens(), rounds=2)
    assert {len(times) for times in taken.values()} == {2}
    times = dict.fromkeys(taken, [observation.Seconds(1.0, 1.0)] * 3)
    times[observation.CAPTURE] = [
        observation.Seconds(2.0, 6.0),
        observation.Seconds(1.5, 0.5),
        observation.Seconds(1.0, 4.0),
    ]
    observation.report(times)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-4:] for line in lines[-5:-3]] == [
        ["1.000", "≤", "1.02", "1.000"],
        ["2.500", "≤", "1.08", "1.500"],
    ]
    capture = next(line for line in lines if observation.CAPTURE in line)
    assert capture.split()[-2:] == ["1.500", "4.000"]
    assert lines[-1].split()[-2:] == ["2.500", "1.500"]
