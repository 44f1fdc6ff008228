"""The whole suite: what is chosen, what is not checked, and what a report concludes."""

from dataclasses import replace

import pytest
import torch

from clean_transformer.parity import inputs, suite
from clean_transformer.parity.activations.isolated import PATHS, Isolated
from clean_transformer.parity.cliffs import cliff_runs
from clean_transformer.parity.faults import inject
from clean_transformer.parity.inputs import LENGTH, choose_weights, suite_tokens
from clean_transformer.parity.modes import choose_modes
from clean_transformer.parity.results import DeviceRun
from clean_transformer.parity.suite import check_device, number_of_steps, run_suite
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.uses.table import uses
from clean_transformer.parity.verdict import Verdict
from clean_transformer.support.devices import choose_devices
from clean_transformer.support.dtypes import choose_dtypes
from clean_transformer.weights.hub import HubError

from ..helpers import tiny
from .small import BF16, F16, F32, F64, no_float64, small_weights

WEIGHTS = small_weights(d_vocab=300, n_ctx=16)


@pytest.mark.parametrize(
    ("choose", "names", "message"),
    [
        (choose_devices, "cpu,gpu", "unknown device 'gpu'; this machine has"),
        (choose_devices, "", "unknown device ''"),
        (choose_dtypes, "float32,fp8", "no dtype 'fp8'; choose from float64, float32"),
        (choose_modes, "fast", "no mode 'fast'; choose from eager, compiled, autocast, opt"),
        (choose_weights, "stress:tiny", "no published GPT-2 has size 'tiny'"),
    ],
)
def test_what_does_not_exist_is_refused(choose, names: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(names)


def test_all_and_some() -> None:
    assert choose_devices("all") == ["cpu", "cuda", "mps"]
    assert choose_devices("cpu,cuda:1") == ["cpu", "cuda:1"]
    assert len(choose_devices("auto")) == 1
    assert choose_dtypes("all") == ["float64", "float32", "bfloat16", "float16"]
    assert choose_dtypes("float16,float32") == ["float16", "float32"]
    assert choose_modes("all") == [
        "eager",
        "compiled",
        "autocast",
        "optimized",
        "optimized-compiled",
    ]


def test_weights_fall_back_only_where_none_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object) -> None:
        raise HubError("the hub is out of reach")

    monkeypatch.setattr(inputs, "fetch", unreachable)
    monkeypatch.setitem(inputs.SYNTHETIC, "stress", lambda cfg: {})
    fallen_back = choose_weights(None)
    assert "synthetic 'stress' weights" in fallen_back.title
    assert fallen_back.title.endswith("because gpt2 cannot be downloaded (--weights gpt2 says why)")
    with pytest.raises(HubError):
        choose_weights("gpt2")


def test_tokens_hold_the_last_id_and_0() -> None:
    tokens = suite_tokens(WEIGHTS.cfg, 2, 9)
    assert tokens.shape == (2, 9)
    assert tokens[:, 0].tolist() == [299, 299]
    assert (tokens[0, 4], tokens[1, -1]) == (299, 0)
    assert len(tokens.unique()) == 16
    assert suite_tokens(tiny(n_ctx=1), 2).tolist() == [[30], [30]]


def test_cliffs_have_their_lengths_and_layouts() -> None:
    exact = ExactParts(WEIGHTS.cfg, WEIGHTS.state, F32)
    runs = cliff_runs(exact, torch.empty(0, dtype=BF16))
    assert {(name, path) for name, _, path, _ in runs} == {
        ("blocks.1", "fused"),
        ("blocks.1", "explicit"),
    }
    cases = {case: x for _, case, _, x in runs}
    assert {x.dtype for x in cases.values()} == {BF16}
    assert {name: x.shape[1] for name, x in cases.items() if "tokens" in name} == {
        f"1 × {length} tokens": length for length in (1, 2, 8, 9, 16)
    }
    assert not cases["permuted input"].is_contiguous()
    assert not cases["transposed input"].is_contiguous()
    assert cases["sliced input"].shape == (2, 16, 128)


def test_long_cliffs_run_both_paths_in_every_kernel_that_differs() -> None:
    weights = small_weights(d_vocab=300, n_ctx=LENGTH + 1)
    runs = cliff_runs(ExactParts(weights.cfg, weights.state, F32), torch.empty(0))
    long = {(name, path) for name, case, path, _ in runs if case == f"1 × {LENGTH + 1} tokens"}
    explicit = {(f"blocks.1.{part}", "explicit") for part in ("ln1", "attn")}
    assert long == {("blocks.1", "fused"), *explicit}


@pytest.mark.parametrize(
    ("device", "dtype", "mode", "reason"),
    [
        ("mps", F32, "eager", "this machine has no mps"),
        ("cuda", F32, "eager", "this machine has no cuda"),
        ("cpu", BF16, "autocast", "autocast lowers the precision of float32 only"),
    ],
)
def test_what_cannot_be_checked_is_not_checked(device, dtype, mode, reason) -> None:
    if reason.startswith("this machine") and device in choose_devices("auto"):
        pytest.skip("this machine has it")
    run = check_device(WEIGHTS, device, dtype, mode=mode)
    assert (run.verdict, run.not_checked) == (Verdict.NOT_CHECKED, reason)
    assert run.verdict.exit_status == 3


@pytest.mark.parametrize(
    ("device", "dtype", "mode", "message"),
    [
        ("cpu", "float32", "compile", "mode is 'compile'"),
        ("cpu", "float32", "all", "mode is 'all'"),
        ("cpu", "float32", "eager,compiled", "mode is 'eager,compiled'"),
        ("cuuda", "float32", "eager", "unknown device 'cuuda'"),
        ("cpu", "fp8", "eager", "no dtype 'fp8'"),
    ],
)
def test_what_is_unknown_is_refused_before_any_work(
    device: str, dtype: str, mode: str, message: str
) -> None:
    steps: list[str] = []
    if dtype == "float32":
        with pytest.raises(ValueError, match=message):
            check_device(WEIGHTS, device, F32, mode=mode, on_step=steps.append)
    given = ["cpu", device], [dtype], ["eager", mode]
    with pytest.raises(ValueError, match=message):
        run_suite(WEIGHTS, *given, reference="huggingface", on_step=steps.append)
    assert not steps


def test_mps_has_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "is_available", lambda device: True)
    assert check_device(WEIGHTS, "mps", F64).not_checked == "mps has no float64"


@pytest.mark.usefixtures("model_alone")
@pytest.mark.parametrize(
    "dtype", [F32, *(pytest.param(each, marks=pytest.mark.slow) for each in (BF16, F16))]
)
def test_a_healthy_device_passes_and_meets_no_float64(dtype: torch.dtype) -> None:
    steps: list[str] = []
    with no_float64():
        run = check_device(WEIGHTS, "cpu", dtype, on_step=steps.append)
    assert run.verdict is Verdict.PASS, (run.first_failure, run.invariants)
    assert run.first_failure is run.located is None
    assert {row.path for row in run.isolated} == {*PATHS}
    assert len({row.case for row in run.isolated}) == 1 + 5 + 3
    assert run.impact is not None
    assert (steps[0], steps[-1]) == ("first call", "single operations")
    left_out = len(uses(WEIGHTS.cfg)) - 1
    assert len(steps) == number_of_steps(WEIGHTS.cfg) - left_out


@pytest.mark.slow
@pytest.mark.usefixtures("model_alone")
def test_float64_and_autocast_pass() -> None:
    run = check_device(WEIGHTS, "cpu", F64)
    assert run.verdict is Verdict.PASS
    assert all(check.allowed > 0 for check in run.invariants)
    run = check_device(WEIGHTS, "cpu", F32, mode="autocast")
    assert run.verdict is Verdict.PASS, (run.first_failure, run.invariants)
    assert run.probes == []


def row(name: str, ratio: float, case: str = "") -> Isolated:
    return Isolated(name, case, "fused", "linear", ratio, 30.0, 100.0, ratio, 24.0, (0,))


def test_the_first_failure_is_the_first_of_the_forward_pass() -> None:
    """A later run of one block may find what the first run passed by."""
    rows = [row("a", 1.0), row("b", 1.0), row("c", 999.0)]
    rows += [row("a", 1.0, "long"), row("b", 50.0, "long")]
    run = DeviceRun("cpu", "float32", isolated=rows)
    assert run.first_failure == rows[4]
    assert run.verdict is Verdict.WRONG
    assert DeviceRun("cpu", "float32", isolated=rows[:2]).verdict is Verdict.PASS
    assert DeviceRun("cpu", "float32").verdict is Verdict.NOT_CHECKED


def test_a_run_without_a_reference_does_not_pass() -> None:
    report = run_suite(WEIGHTS, [], [], reference=None, no_reference="not asked for")
    assert (report.verdict, report.verdict.exit_status) == (Verdict.NOT_CHECKED, 3)
    assert (report.no_reference, report.tokens) == ("not asked for", (2, 16))


@pytest.mark.usefixtures("model_alone")
def test_the_whole_suite(installed: str) -> None:
    report = run_suite(WEIGHTS, ["cpu"], ["float32"], reference=installed)
    assert report.verdict is Verdict.PASS
    compared, cached = report.same_function.coverage
    assert compared == cached > (30 if installed == "huggingface" else 50)
    assert any(row.reference_error for row in report.runs[0].end_to_end)
    assert [run.verdict for run in report.runs] == [Verdict.PASS]
    absent = DeviceRun("mps", "float32", not_checked="none")
    assert replace(report, runs=[*report.runs, absent]).verdict is Verdict.NOT_CHECKED
    alone = replace(report, same_function=None, no_reference="none is installed")
    assert alone.verdict is Verdict.NOT_CHECKED
    with inject("exact-gelu"):
        assert run_suite(WEIGHTS, [], [], reference=installed).verdict is Verdict.WRONG
