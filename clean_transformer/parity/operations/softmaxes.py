"""Rules for softmax, log-softmax and logsumexp.

A rule returns an `Expected` (exact value and allowed error) for each output of a call.
"""

from clean_transformer.parity.limits import SOFTMAX
from clean_transformer.parity.operations.replay import Call64, Expected
from clean_transformer.parity.operations.rules import Rule, reduced, rows, unless_integer, within
from clean_transformer.parity.scales import softmax_scale


def _softmax(call: Call64) -> list[Expected | None]:
    exact, scores, dim = call.run(), call.named["self"], call.named["dim"]
    scale = softmax_scale(exact, scores, dim)
    return [within(SOFTMAX, call, exact, scale, scores.shape[dim] if scores.ndim else 1)]


def _log_softmax(call: Call64) -> list[Expected | None]:
    """Return log-softmax, s − max s − log Σ exp(s − max s) for scores s, and the allowed error."""
    exact, scores, dim = call.run(), call.named["self"], call.named["dim"]
    scale = 1 + (scores - scores.amax(dim, keepdim=True)).abs() + exact.abs()
    return [within(SOFTMAX, call, exact, scale, scores.shape[dim] if scores.ndim else 1)]


def _logsumexp(call: Call64) -> list[Expected | None]:
    """Return max s + log Σ exp(s − max s) for scores s, and the allowed error."""
    exact, scores, dim = call.run(), call.named["self"], call.named["dim"]
    total, top = scores.logsumexp(dim, keepdim=True), scores.amax(dim, keepdim=True)
    # The error of s − max s changes log Σ in proportion to the softmax of s.
    part = (scores - total).exp() * (scores - top).abs()
    size = part.nan_to_num(0.0).sum(dim, keepdim=True) + total.abs() + (total - top).abs()
    scale = 1 + size.reshape(exact.shape)
    return [within(SOFTMAX, call, exact, scale, reduced(call.named, exact))]


SOFTMAXES: dict[str, Rule] = {
    **rows("_softmax softmax _safe_softmax", unless_integer(_softmax)),
    **rows("_log_softmax log_softmax", unless_integer(_log_softmax)),
    **rows("logsumexp", unless_integer(_logsumexp)),
}
