"""Checks the model in every use: reading texts, generating text, training and others."""

from collections.abc import Callable

import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.parity.attempts import failed_check
from clean_transformer.parity.locate import in_words
from clean_transformer.parity.uses.judge import Judge, UseResult
from clean_transformer.parity.uses.sampling import check_sampling
from clean_transformer.parity.uses.table import Use, uses
from clean_transformer.parity.uses.training import judge_training
from clean_transformer.parity.verdict import Check

# The use that `judge_sampling` judges: choosing the next token from four rows of logits.
SAMPLING = Use("sampling", "choosing the next token", 4, (1,))


def judge_uses(
    judge: Judge,
    *,
    locates: bool = True,
    on_step: Callable[[str], None] = lambda step: None,
) -> list[UseResult]:
    """Check the model in every use: first those from `uses(cfg)`, then training, then sampling.

    Returns one result for each use. If a use does not pass and `locates` is True, the check also
    searches for the first wrong operation, and stores it in `UseResult.located`. For sampling, the
    check searches even if `locates` is False. Before each use, `on_step` is called with a text that
    names the use.
    """
    model, results = judge.model, []
    for use in uses(model.cfg):
        on_step(use.case)
        results.append(judge(use, locates=locates))
    on_step("training")
    results.append(judge_training(judge, locates=locates))
    on_step("sampling")
    try:
        tokens = uses(model.cfg)[0].calls(model.cfg)[0].to(model.device)
        with torch.no_grad():
            logits = model(tokens).flatten(0, 1)[-SAMPLING.batch :]
        results.append(judge_sampling(model.cfg, logits))
    except Exception as error:
        results.append(UseResult(SAMPLING, (failed_check(SAMPLING.name, error),)))
    return results


def judge_sampling(cfg: Config, logits: Tensor) -> UseResult:
    """Check every operation that chooses the next token from the logits, such as softmax and top-k.

    `logits` [row d_vocab] are on the device under test. The result has one check for each sampling
    setting in `SETTINGS`, and one check for beam search.
    """
    reports = check_sampling(cfg, logits)
    rows = tuple(
        Check(
            f"sampling, {name}",
            report.verdict,
            max(report.largest.values(), default=0.0),
            note=report.finding.diagnosis if report.finding else "",
        )
        for name, report in reports
    )
    found = (in_words(one.finding, f"sampling, {name}") for name, one in reports if one.finding)
    return UseResult(SAMPLING, rows, located=next(found, None))
