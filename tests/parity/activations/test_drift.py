"""Drift over the whole run, beside what rounding alone does on the CPU; and what a user notices."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clean_transformer.analysis.comparison import LOGITS, Impact, impact, rms_errors
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.inputs import Weights, choose_weights, suite_tokens
from clean_transformer.parity.limits import HEALTHY_DIFFERENCE, largest_drift
from clean_transformer.parity.measurements import Subject, end_to_end, record_run
from clean_transformer.parity.rounding import RandomRounding
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.verdict import Verdict
from clean_transformer.support.replaced import replaced

from ..small import BF16, F16, F32, broken, everywhere, small_model, small_weights

WEIGHTS = small_weights(d_vocab=300)


def measured(
    dtype: torch.dtype, weights: Weights = WEIGHTS
) -> tuple[dict[str, EndToEnd], Impact, float]:
    model = small_model(weights, dtype)
    exact = ExactParts(weights.cfg, weights.state, dtype)
    subject = Subject(model, exact, suite_tokens(model.cfg, 2, 9), None)
    with torch.no_grad():
        rows, felt, allowed = end_to_end(subject, record_run(subject), None)
    return {row.name: row for row in rows}, felt, allowed


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_healthy_run_stays_within_its_rounding_and_a_drift_does_not(dtype: torch.dtype) -> None:
    healthy, _, allowed = measured(dtype)
    residual = ["blocks.0.hook_resid_pre", *(f"blocks.{n}.hook_resid_post" for n in (0, 1))]
    assert [*healthy] == [*residual, "ln_final", LOGITS]
    assert all(0 < row.rho < row.healthy / 2 for row in healthy.values()), healthy
    assert allowed <= HEALTHY_DIFFERENCE[dtype] * largest_drift(WEIGHTS.cfg, dtype)

    with scaled_block_output(1 + 64 * torch.finfo(dtype).eps):
        drifted, _, same = measured(dtype)
    assert drifted["blocks.0.hook_resid_pre"].verdict is Verdict.PASS
    assert drifted["blocks.0.hook_resid_post"].verdict is Verdict.DEGRADED
    assert same == allowed


def test_the_impact_is_of_the_fused_path() -> None:
    """Nothing is watched, so that no explicit attention stands in for the fused kernel."""

    def backwards(func, args, options):
        z, *others = func(*args, **options)
        return z.flip(-2), *others

    fault = broken("_scaled_dot_product_flash_attention_for_cpu", backwards)
    with fault:
        rows, felt, _ = measured(F32, choose_weights("demo"))
    assert felt.top1_flips > felt.positions / 4
    assert felt.kl_divergence > 0.01
    assert rows["blocks.0.hook_resid_post"].verdict is Verdict.DEGRADED


def test_what_is_wrong_in_every_dtype_does_not_widen_its_own_allowance() -> None:
    _, _, allowed = measured(F32)

    def unbiased(x, shape, weight, bias, eps):
        reciprocal = 1 / (x.var(-1, keepdim=True) + eps).sqrt()
        mean = x.mean(-1, keepdim=True)
        return (x - mean) * reciprocal * weight + bias, mean, reciprocal

    with everywhere("native_layer_norm", unbiased):
        _, _, with_fault = measured(F32)
    assert with_fault == pytest.approx(allowed, rel=1e-3)


def test_the_allowance_has_a_ceiling() -> None:
    """A float64 kernel whose errors are random would widen it without one."""

    def noisy(bias, x, weight, *, beta=1, alpha=1):
        y = bias + torch.bmm(x[None], weight[None])[0]
        return y * (1 + 0.1 * torch.randn_like(y))

    with everywhere("addmm", noisy):
        rows, _, allowed = measured(F32)
    ceiling = largest_drift(WEIGHTS.cfg, F32)
    assert allowed == pytest.approx(HEALTHY_DIFFERENCE[F32] * ceiling)
    assert rows[LOGITS].verdict is Verdict.DEGRADED


def in_order(x: Tensor, weight: Tensor) -> Tensor:
    """x W, added up one product after the other."""
    total = torch.zeros(len(x), weight.shape[1], dtype=x.dtype)
    for k in range(len(weight)):
        total += x[:, k, None] * weight[k]
    return total


def test_sums_in_order_are_healthy() -> None:
    with broken("addmm", lambda func, args, options: args[0] + in_order(args[1], args[2])):
        rows, _, _ = measured(F32)
    assert all(row.verdict is Verdict.PASS for row in rows.values()), rows


@contextmanager
def scaled_block_output(factor: float) -> Iterator[None]:
    """Within it, the first block of every model in the dtype under test is off by that factor."""
    forward = TransformerBlock.forward

    def off(self, *args, **options):
        output = forward(self, *args, **options)
        return output if output.dtype == torch.float64 else output * factor

    with replaced(TransformerBlock, "forward", off):
        yield


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


def test_random_rounding_leaves_masked_scores_masked() -> None:
    scores = torch.ones(8, 8, dtype=torch.float64)
    mask = torch.zeros(8, 8, dtype=torch.float64).masked_fill(
        torch.ones(8, 8).triu(1) > 0, -math.inf
    )
    with RandomRounding(F32):
        masked = scores + mask
    assert torch.equal(masked == -math.inf, mask == -math.inf)
    assert not masked.isnan().any()
