"""Drift over the whole run, beside what rounding alone does on the CPU; and what a user notices."""

import math

import pytest
import torch
import torch.nn.functional as F

from clean_transformer.analysis.comparison import LOGITS, impact, rms_errors, run
from clean_transformer.parity.activations.drift import EndToEnd, healthy_envelope, threads
from clean_transformer.parity.inputs import suite_tokens
from clean_transformer.parity.oracle import float64_oracle
from clean_transformer.parity.verdict import Verdict

from ..small import BF16, F16, F32, corrupted, small_model, small_weights

WEIGHTS = small_weights(d_vocab=300)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_envelope_holds_healthy_runs_and_not_a_drift(dtype: torch.dtype) -> None:
    model = small_model(WEIGHTS, dtype)
    tokens = suite_tokens(model.cfg, 2, 9)
    exact = run(float64_oracle(model), tokens)
    envelope = healthy_envelope(model, tokens, exact)
    assert envelope.keys() == exact.keys() == {*model.default_points(), LOGITS}
    healthy = rms_errors(run(model, tokens), exact)
    assert all(healthy[name] <= envelope[name] for name in exact)
    assert all(math.isfinite(error) for error in envelope.values())

    with corrupted(
        model, "blocks.0.hook_resid_mid", lambda x: x * (1 + 64 * torch.finfo(dtype).eps)
    ):
        drifted = rms_errors(run(model, tokens), exact)
    grown = [name for name in exact if drifted[name] > 3 * envelope[name]]
    assert grown[0] == "blocks.0.hook_resid_mid"
    assert LOGITS in grown


@pytest.mark.parametrize("dtype", [torch.float64, F32, BF16, F16])
def test_one_ulp_in_the_embeddings_is_felt_in_every_dtype(dtype: torch.dtype) -> None:
    """What no product has gone into yet, so that nothing else can tell two runs apart."""
    model = small_model(WEIGHTS, dtype)
    tokens = suite_tokens(WEIGHTS.cfg, 2, 9)

    oracle = run(float64_oracle(model), tokens)
    envelope = healthy_envelope(model, tokens, oracle)

    alone = rms_errors(run(model, tokens), oracle)["hook_embed"]
    assert envelope["hook_embed"] > alone


def test_the_envelope_leaves_the_model_as_it_was() -> None:
    model = small_model(WEIGHTS)
    tokens = suite_tokens(model.cfg, 2, 5)
    before = run(model, tokens)[LOGITS]
    with threads(2):
        healthy_envelope(model, tokens, run(float64_oracle(model), tokens))
        assert torch.get_num_threads() == 2
    assert torch.equal(run(model, tokens)[LOGITS], before)
    assert not model.hook_embed._forward_hooks


@pytest.mark.parametrize(
    ("error", "envelope", "rho", "verdict"),
    [
        (2.0, 1.0, 2.0, Verdict.PASS),
        (2.1, 1.0, 2.1, Verdict.DEGRADED),
        (0.0, 0.0, 0.0, Verdict.PASS),
        (1e-9, 0.0, math.inf, Verdict.DEGRADED),
        (math.nan, 1.0, math.inf, Verdict.WRONG),
        (math.inf, 1.0, math.inf, Verdict.WRONG),
        (math.inf, math.inf, math.inf, Verdict.WRONG),
        (1.0, math.nan, math.nan, Verdict.DEGRADED),
    ],
)
def test_rho(error: float, envelope: float, rho: float, verdict: Verdict) -> None:
    row = EndToEnd("x", error, envelope, healthy=2.0)
    assert row.rho == pytest.approx(rho, nan_ok=True)
    assert row.verdict is verdict


def test_rms_errors_by_hand() -> None:
    exact = {"a": torch.tensor([1.0, -math.inf]).double(), "b": torch.zeros(1).double()}
    assert rms_errors({"a": torch.tensor([4.0, -math.inf])}, exact) == {
        "a": pytest.approx(3 / math.sqrt(2))
    }


def test_impact_is_what_its_definition_says() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(2, 5, 7, generator=generator).double()
    logits = (exact + 0.5 * torch.randn(2, 5, 7, generator=generator)).float()
    tokens = torch.randint(7, (2, 5), generator=generator)
    felt = impact(logits, exact, tokens)
    assert felt.positions == 10
    assert felt.top1_flips == sum(
        int(logits[b, t].argmax() != exact[b, t].argmax()) for b in range(2) for t in range(5)
    )
    assert felt.top1_flips > 0
    p, q = exact.softmax(-1), logits.double().softmax(-1)
    assert felt.kl_divergence == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    losses = [F.cross_entropy(x[:, :-1].mT, tokens[:, 1:]) for x in (logits.double(), exact)]
    assert felt.loss_change == pytest.approx(float(losses[0] - losses[1]))
    same = impact(exact.float(), exact.float().double(), tokens)
    assert (same.top1_flips, same.kl_divergence, same.loss_change) == (0, 0.0, 0.0)
