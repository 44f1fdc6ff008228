"""An exception is the result of one measurement; the other measurements still run."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from rich.console import Console

from clean_transformer.parity import invariants, suite
from clean_transformer.parity.attempts import Attempts, failed_check
from clean_transformer.parity.faults import inject
from clean_transformer.parity.faults.corruptions import DeviceFault
from clean_transformer.parity.operations import probes
from clean_transformer.parity.operations.call import Call
from clean_transformer.parity.report.json import to_json
from clean_transformer.parity.report.page import render
from clean_transformer.parity.report.terminal import print_diagnosis, print_report
from clean_transformer.parity.results import DeviceRun
from clean_transformer.parity.suite import check_device, run_suite
from clean_transformer.parity.uses import overflow
from clean_transformer.parity.verdict import Verdict

from ..pages import Page
from .small import F16, F32, small_weights

WEIGHTS = small_weights(n_layers=1, d_vocab=100, n_ctx=16)
SDPA = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"}


def raising(
    error: BaseException,
    operations: set[str],
    condition: Callable[[Call], bool] = lambda call: True,
) -> AbstractContextManager[Any]:
    """Within it, the device raises `error` in these operations, if the call meets the condition."""

    def corrupt(func: Any, args: Any, kwargs: Any) -> Any:
        raise error

    return DeviceFault("", "", frozenset(operations), condition, corrupt).plant()


def one_query(call: Call) -> bool:
    return call.operands[0].shape[-2] == 1 and call.operands[1].shape[-2] > 1


def by_use(run: DeviceRun) -> dict[str, Verdict]:
    return {use.name: use.verdict for use in run.by_use}


@pytest.mark.parametrize(
    ("error", "verdict", "note"),
    [
        (ValueError("no such\nthing"), Verdict.ERROR, "ValueError: no such"),
        (AssertionError(), Verdict.ERROR, "AssertionError"),
        (MemoryError(), Verdict.ERROR, "out of memory (MemoryError)"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            Verdict.ERROR,
            "out of memory (OutOfMemoryError: CUDA out of memory. Tried)",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            Verdict.ERROR,
            "out of memory (RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried)",
        ),
        (NotImplementedError("no mps"), Verdict.NOT_CHECKED, "NotImplementedError: no mps"),
        (
            RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'"),
            Verdict.NOT_CHECKED,
            "RuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'",
        ),
    ],
)
def test_an_exception_in_words(error: Exception, verdict: Verdict, note: str) -> None:
    check = failed_check("name", error)
    assert (check.name, check.verdict, check.note, check.measured) == ("name", verdict, note, None)


def test_a_missing_operation_is_found_behind_another_exception() -> None:
    error = RuntimeError("wrapped")
    error.__cause__ = NotImplementedError("the operation")
    assert failed_check("name", error).verdict is Verdict.NOT_CHECKED


class BackendCompilerFailed(RuntimeError):
    """Has the name of the exception that Dynamo raises if the backend of `torch.compile` fails."""


def test_a_missing_compiler_is_not_checked() -> None:
    check = failed_check("name", BackendCompilerFailed("backend='inductor' raised:\nno gcc\nmore"))
    assert check.verdict is Verdict.NOT_CHECKED
    assert check.note == "BackendCompilerFailed: backend='inductor' raised: no gcc"


def test_a_device_without_memory_for_the_first_measurement_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(overflow, "overflowing_activation", no_memory)
    monkeypatch.setattr(suite, "_start", no_memory)
    run = check_device(WEIGHTS, "cpu", F16)
    assert (run.verdict, run.verdict.exit_status) == (Verdict.ERROR, 2)
    assert [error.name for error in run.errors] == [
        "the largest numbers in float16",
        "the model on the device",
    ]


def test_ctrl_c_stops_everything() -> None:
    with raising(KeyboardInterrupt(), SDPA), pytest.raises(KeyboardInterrupt):
        check_device(WEIGHTS, "cpu", F32)


def test_attempts_go_on() -> None:
    attempts = Attempts()
    assert attempts.run("division", lambda: 1 / 0, 7) == 7
    assert attempts.run("sum", lambda: 1 + 1, 7) == 2
    assert [check.name for check in attempts.failed] == ["division"]


@pytest.fixture(scope="module")
def decoding_fails() -> DeviceRun:
    fails = raising(RuntimeError("decoding [is] broken\nat line 7"), SDPA, one_query)
    here = [each for each in invariants.INVARIANTS if each.__name__ != "fresh_process"]
    few = [probe for probe in probes.PROBES if probe.name.endswith(("1x1024", "8x1024"))]
    with pytest.MonkeyPatch.context() as patched, fails:
        patched.setattr(invariants, "INVARIANTS", here)
        patched.setattr(probes, "PROBES", few)
        return check_device(WEIGHTS, "cpu", F32)


def test_an_exception_in_a_use_is_the_result_of_this_use(decoding_fails: DeviceRun) -> None:
    verdicts = by_use(decoding_fails)
    assert {name for name, verdict in verdicts.items() if verdict is Verdict.ERROR} == {
        "forward",  # whose verdict includes the invariant of cached decoding
        "generate",
        "unequal batch",
        "beams",
    }
    assert verdicts["long text"] is verdicts["sampling"] is Verdict.PASS
    checks = {check.name: check for check in decoding_fails.invariants}
    assert checks["cached decoding"].note == "RuntimeError: decoding [is] broken"
    assert checks["causality"].verdict is Verdict.PASS
    assert decoding_fails.verdict is Verdict.ERROR
    assert decoding_fails.verdict.exit_status == 2
    # Single operations fail one by one, too.
    assert {check.verdict for check in decoding_fails.probes} == {Verdict.PASS, Verdict.ERROR}


@pytest.mark.usefixtures("model_alone")
def test_a_fault_counts_more_than_an_exception() -> None:
    with (
        raising(RuntimeError("no softmax"), {"_softmax"}),
        inject("gelu-tanh-ignored"),
    ):
        run = check_device(WEIGHTS, "cpu", F32)
    assert run.verdict is Verdict.WRONG
    assert run.first_failure is not None
    assert getattr(run.first_failure, "operation", "") == "gelu_new"
    assert by_use(run)["hooks"] is Verdict.ERROR  # every run that it judges needs a softmax
    assert {error.note for error in run.errors} == {"RuntimeError: no softmax"}
    assert any(error.name.endswith("explicit") for error in run.errors)


@pytest.mark.slow
@pytest.mark.usefixtures("model_alone")
def test_the_search_for_the_operation_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*args: object) -> None:
        raise RuntimeError("lost")

    monkeypatch.setattr("clean_transformer.parity.measurements.locate", search)
    with inject("gelu-tanh-ignored"):
        run = check_device(WEIGHTS, "cpu", F32)
    assert run.verdict is Verdict.WRONG
    assert [error.note for error in run.errors] == ["RuntimeError: lost"]


@pytest.mark.slow
@pytest.mark.usefixtures("model_alone")
def test_drift_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(suite, "end_to_end", fail)
    run = check_device(WEIGHTS, "cpu", F32)
    assert run.verdict is Verdict.ERROR
    assert [error.name for error in run.errors] == ["end to end"]
    assert run.invariants[0].verdict is Verdict.PASS  # the oracle beside NumPy
    assert run.invariants[-1].verdict is Verdict.NOT_CHECKED
    assert run.isolated


# In a process of its own, because the checks of types that tests have cannot be compiled.
WITHOUT_A_COMPILER = """
import torch
from clean_transformer.config import Config
from clean_transformer.parity import invariants
from clean_transformer.parity.inputs import Weights
from clean_transformer.parity.suite import check_device
from clean_transformer.weights.synthetic import stress

def no_compiler(*args):
    raise RuntimeError("no C++ compiler")

compile = torch.compile
torch.compile = lambda function, **options: compile(function, backend=no_compiler)
invariants.INVARIANTS = ()
cfg = Config(n_layers=1, n_heads=1, d_model=8, d_head=8, d_mlp=8, d_vocab=50, n_ctx=8)
run = check_device(Weights("", cfg, stress(cfg)), "cpu", torch.float32, mode="compiled")
assert run.verdict.value == "NOT CHECKED", run.verdict
assert {error.verdict.value for error in run.errors} == {"NOT CHECKED"}, run.errors
assert {use.name: use for use in run.by_use}["forward"].verdict.value == "NOT CHECKED"
*tried, compilation = run.errors
assert tried and all(error.note.endswith("RuntimeError: no C++ compiler") for error in tried)
assert compilation.note.startswith("torch.compile made no graph")
"""


@pytest.mark.slow
def test_without_a_compiler_nothing_is_checked() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_A_COMPILER], check=True)


@pytest.mark.slow
@pytest.mark.usefixtures("model_alone")
def test_a_device_that_returns_no_values_is_reported_cell_by_cell() -> None:
    report = run_suite(WEIGHTS, ["meta", "cpu"], ["float32"], reference=None)
    nothing, healthy = report.runs
    assert nothing.verdict in (Verdict.NOT_CHECKED, Verdict.ERROR)
    assert healthy.verdict is Verdict.PASS
    assert nothing.isolated == nothing.end_to_end == []
    assert nothing.errors
    shown(report.runs[0])


def shown(run: DeviceRun, width: int = 80) -> str:
    """The run as `doctor` prints it. The lines must fit the width."""
    file = io.StringIO()
    print_diagnosis(run, "small weights", Console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_every_report_tells_it(decoding_fails: DeviceRun, width: int) -> None:
    told = " ".join(shown(decoding_fails, width).split())
    sentence = "Failed with an exception: reading short texts, generating text"
    assert told.index(sentence) < told.index("checks:")
    assert "Right: reading texts of 16 tokens, training, choosing the next token" in told
    assert "RuntimeError: decoding [is] broken" in told
    report = run_suite(WEIGHTS, [], [], reference=None)
    report.runs.append(decoding_fails)
    file = io.StringIO()
    print_report(report, Console(file=file, width=width), worst_rows=3)
    printed = file.getvalue()
    assert "ERROR" in printed
    assert sentence in " ".join(printed.split())
    (top,) = Page(render(report)).root.all("id", "top")
    assert sentence in top.words()
    plain = json.loads(json.dumps(to_json(report), allow_nan=False))["runs"][0]
    assert plain["verdict"] == "ERROR"
    assert plain["first_failure"]["note"] == "RuntimeError: decoding [is] broken"
