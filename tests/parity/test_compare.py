import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.modules import attention
from clean_transformer.parity.references.base import LOGITS, Reference
from clean_transformer.parity.references.choose import REFERENCES
from clean_transformer.parity.same_function import Comparison, ParityReport, compare
from clean_transformer.parity.verdict import Verdict

from ..helpers import TINY, needs, quietly, random_model, random_tokens, tiny

TOKENS = random_tokens()
HUGGING_FACE = [{}, {"tied_unembed": False}, {"eps": 1e-3}]
HOOKED = [*HUGGING_FACE, {"d_head": 5}, {"normalization_type": "LNPre", "tied_unembed": False}]
CASES = [(kind, c) for kind in ("bridge", "huggingface") for c in HUGGING_FACE] + [
    ("hooked", changes) for changes in HOOKED
]


def against(kind: str, cfg: Config) -> tuple[DemoTransformer, Reference]:
    model = random_model(cfg, b_U=kind == "hooked")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return model, quietly(REFERENCES[kind], cfg, state)


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_every_activation_of_a_reference_agrees(installed: str, kind: str, changes: dict):
    needs(kind, installed)
    model, reference = against(kind, tiny(**changes))
    report = compare(model, reference, TOKENS)
    assert report.first_failure is None
    assert report.verdict is Verdict.PASS
    compared, cached = report.coverage
    assert compared == cached == len(report.rows)
    # At the least: what each of two layers, and the ends, have in all references.
    assert {row.name for row in report.rows} >= {
        "hook_embed",
        "blocks.0.attn.hook_pattern",
        "blocks.1.mlp.hook_post",
        "blocks.1.hook_resid_post",
        LOGITS,
    }
    assert report.reference == reference.title


# What the comparison must notice, against whatever is installed.


@pytest.fixture(scope="module")
def pair(installed: str) -> tuple[DemoTransformer, Reference]:
    return against(installed, TINY)


def first_wrong(pair) -> Comparison:
    report = compare(*pair, TOKENS)
    assert report.verdict is Verdict.WRONG
    return report.first_failure


def test_exact_gelu(pair, monkeypatch):
    exact = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate: exact(x))
    assert first_wrong(pair).name == "blocks.0.mlp.hook_post"


@pytest.mark.parametrize("offset", [-1, 1])
def test_mask_off_by_one(pair, installed: str, monkeypatch, offset: int):
    def causal_mask(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        n_queries, n_keys = q.shape[1], k.shape[1]
        return torch.ones(n_queries, n_keys).tril(n_keys - n_queries + offset).bool()

    monkeypatch.setattr(attention, "causal_mask", causal_mask)
    # GPT2LMHeadModel has no attention scores to compare.
    first = "hook_z" if installed == "huggingface" else "hook_attn_scores"
    assert first_wrong(pair).name == f"blocks.0.attn.{first}"


@pytest.mark.parametrize(
    ("parameter", "seen_in"),
    [
        ("embed.W_E", "hook_embed"),
        ("blocks.0.attn.W_K", "blocks.0.attn.hook_k"),
        ("blocks.1.attn.W_O", "blocks.1.hook_attn_out"),
        ("blocks.1.mlp.b_out", "blocks.1.hook_mlp_out"),
    ],
)
def test_one_parameter_off_by_a_billionth(installed, parameter: str, seen_in: str):
    model, reference = against(installed, TINY)
    with torch.no_grad():
        model.get_parameter(parameter).mul_(1 + 1e-9)
    row = first_wrong((model, reference))
    # With hook_result, HookedTransformer also shows the heads' parts of the output.
    assert row.name in (seen_in, "blocks.1.attn.hook_result")
    assert 1e-12 < row.error < 1e-7


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none(installed, value: float):
    model, reference = against(installed, TINY)
    with torch.no_grad():
        model.blocks[1].mlp.b_in[0] = value
    assert first_wrong((model, reference)).name == "blocks.1.mlp.hook_pre"


def fake(**activations: torch.Tensor) -> Reference:
    return Reference("fake", lambda tokens: activations)


def test_an_unknown_key_is_listed_as_not_checked():
    model = random_model()
    report = compare(model, fake(logits=model(TOKENS), hook_other=torch.ones(2)), TOKENS)
    assert [row.verdict for row in report.rows] == [Verdict.PASS, Verdict.NOT_CHECKED]
    assert report.verdict is Verdict.NOT_CHECKED
    assert report.coverage == (1, 2)
    assert report.first_failure == report.rows[1]
    assert report.rows[1].key == "hook_other"
    assert report.rows[1].note == "our model has no such activation"


def test_another_shape_is_wrong():
    model = random_model()
    (row,) = compare(model, fake(logits=model(TOKENS)[:1]), TOKENS).rows
    assert row.verdict is Verdict.WRONG
    assert row.note == "shape [2, 7, 31] instead of [1, 7, 31]"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_their_number_that_is_none_is_wrong(value: float):
    model = random_model()
    logits = model(TOKENS).detach().clone()
    logits[0, 0, 0] = value
    assert compare(model, fake(logits=logits), TOKENS).verdict is Verdict.WRONG


def test_an_error_in_units_of_the_element_and_the_scale():
    model = random_model()
    theirs = model(TOKENS).detach()
    theirs[0, 0, 0] *= 1 + 1e-6
    (row,) = compare(model, fake(logits=theirs), TOKENS, tolerance=1e-6).rows
    element, scale = float(theirs[0, 0, 0].abs()), float(theirs.square().mean().sqrt())
    # Of the change, float64 keeps the first 10 of 16 digits.
    assert row.error == pytest.approx(1e-6 * element / (element + scale), rel=1e-5)
    assert row.scale == pytest.approx(scale)
    assert row.verdict is Verdict.PASS
    assert replace(row, tolerance=row.error / 2).verdict is Verdict.WRONG


def test_zeros_agree_with_zeros_only():
    model = random_model()
    with torch.no_grad():
        model.embed.W_E.zero_()  # and with it the unembedding
    zeros = torch.zeros(*TOKENS.shape, TINY.d_vocab, dtype=torch.float64)
    assert compare(model, fake(logits=zeros), TOKENS).verdict is Verdict.PASS
    with torch.no_grad():
        model.unembed.b_U[3] = 1e-300
    assert compare(model, fake(logits=zeros), TOKENS).verdict is Verdict.WRONG


def test_what_our_model_did_not_run_is_wrong():
    model = random_model()
    model.blocks[1].forward = lambda residual, kv_cache: residual
    (row,) = compare(model, fake(**{"blocks.1.mlp": torch.ones(1)}), TOKENS).rows
    assert row.verdict is Verdict.WRONG
    assert row.note == "our model did not compute it"


def test_an_empty_report_is_not_checked():
    assert ParityReport("nobody", []).verdict is Verdict.NOT_CHECKED
    assert ParityReport("nobody", []).first_failure is None
