"""A fault of our loader is WRONG and named, because the reference reads the files itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clean_transformer.parity import inputs
from clean_transformer.parity.faults.loader import LOADER_FAULTS
from clean_transformer.parity.inputs import Weights, choose_weights
from clean_transformer.parity.report.page import render
from clean_transformer.parity.results import SuiteReport
from clean_transformer.parity.same_function import ParityReport
from clean_transformer.parity.suite import run_suite, same_function
from clean_transformer.parity.verdict import Verdict
from clean_transformer.weights.load import read_pretrained

from ..helpers import quietly, random_model, tiny
from ..pages import Page

CFG = tiny(d_mlp=48, n_ctx=40)  # HookedTransformer reads only d_mlp = 4 × d_model

# The activation that the parameter changes first, by the name that all references have.
FIRST = {
    "embed.W_E": "hook_embed",
    "pos_embed.W_pos": "hook_pos_embed",
    "blocks.0.attn.b_Q": "blocks.0.attn.hook_q",
    "blocks.0.attn.b_K": "blocks.0.attn.hook_k",
    "blocks.1.attn.b_O": "blocks.1.hook_attn_out",
    "blocks.0.mlp.b_in": "blocks.0.mlp.hook_pre",
    "blocks.1.mlp.b_out": "blocks.1.hook_mlp_out",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers has written."""
    transformers = pytest.importorskip("transformers")
    fields = {"n_layer": 2, "n_head": 3, "n_embd": 12, "vocab_size": 31, "n_positions": 40}
    config = transformers.GPT2Config(**fields, bos_token_id=30, eos_token_id=30)
    model = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


def compared(weights: Weights, reference: str) -> ParityReport:
    return quietly(same_function, weights, reference)


def test_a_healthy_loader_passes(folder: Path, installed: str) -> None:
    report = compared(choose_weights(str(folder)), installed)
    assert report.verdict is Verdict.PASS, report.first_failure
    assert report.weights == f"{report.reference} has read the weights from {folder} itself"
    assert {row.case for row in report.rows} == {"2 × 33 tokens", "1 × 40 tokens"}
    long = {row.name for row in report.rows if row.case == "1 × 40 tokens"}
    assert long >= {"logits", "hook_pos_embed", "blocks.1.hook_resid_post"}
    assert not any("pattern" in name or "scores" in name for name in long)
    assert report.coverage[0] == report.coverage[1]


def test_every_kind_of_parameter_has_a_fault(folder: Path) -> None:
    def kind(name: str) -> str:
        return name.replace("blocks.0.", "").replace("blocks.1.", "")

    state = choose_weights(str(folder)).state
    assert {kind(name) for name in LOADER_FAULTS} == {kind(name) for name in state}


@pytest.mark.parametrize("parameter", LOADER_FAULTS)
def test_a_fault_of_our_loader_is_wrong(
    parameter: str, folder: Path, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*args):
        cfg, state = read_pretrained(*args)
        return cfg, state | {parameter: LOADER_FAULTS[parameter](state[parameter])}

    monkeypatch.setattr(inputs, "read_pretrained", faulty)
    report = compared(choose_weights(str(folder)), installed)
    assert report.verdict is Verdict.WRONG
    assert report.first_failure is not None
    if parameter == "unembed.b_U":
        assert {row.name for row in report.rows if row.verdict is Verdict.WRONG} >= {"logits"}
    if parameter in FIRST:
        assert report.first_failure.name == FIRST[parameter]


def test_the_last_positions_are_compared(folder: Path, installed: str) -> None:
    weights = choose_weights(str(folder))
    W_pos = weights.state["pos_embed.W_pos"].clone()
    W_pos[35] += 1  # after the 33 positions of the short texts
    report = compared(replace(weights, state=weights.state | {"pos_embed.W_pos": W_pos}), installed)
    assert report.first_failure is not None
    assert report.first_failure.case == "1 × 40 tokens"
    assert report.first_failure.name == "hook_pos_embed"


def test_the_architecture_is_read_independently(
    folder: Path, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_eps(*args):
        cfg, state = read_pretrained(*args)
        return replace(cfg, eps=1e-6), state

    monkeypatch.setattr(inputs, "read_pretrained", other_eps)
    assert compared(choose_weights(str(folder)), installed).verdict is Verdict.WRONG


def test_what_the_reference_cannot_read_is_said(
    tmp_path: Path, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(CFG, dtype=torch.float32)
    weights = Weights("mine", CFG, model.state_dict())
    report = compared(weights, installed)
    assert report.verdict is Verdict.PASS
    assert report.weights.endswith(
        "has got its weights from our loader, because they are not in a folder that it can read"
    )
    (tmp_path / "config.json").write_text("{}")
    report = compared(replace(weights, folder=tmp_path), installed)
    assert report.verdict is Verdict.PASS
    assert f"because transformers cannot read {tmp_path} (" in report.weights
    suite_report = SuiteReport("mine", CFG, (2, 33), {"torch": "2"}, report, "", [])
    assert report.weights in Page(render(suite_report)).root.words()


def test_an_exception_in_the_first_question_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("the reference is broken\nhere")

    monkeypatch.setattr("clean_transformer.parity.suite.same_function", fail)
    weights = Weights("mine", CFG, random_model(CFG, dtype=torch.float32).state_dict())
    report = run_suite(weights, ["meta"], ["float32"], reference=installed)
    assert report.same_verdict is Verdict.ERROR
    assert report.no_reference == "RuntimeError: the reference is broken"
    assert len(report.runs) == 1
