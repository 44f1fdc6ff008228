"""A run in a lower precision is DEGRADED. What this precision does not explain is WRONG."""

from dataclasses import replace

import pytest

from clean_transformer.inference import fast_modules
from clean_transformer.inference.matmuls import Matmul
from clean_transformer.parity import lowered
from clean_transformer.parity.activations.black_box import BLACK_BOX
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.faults import inject
from clean_transformer.parity.limits import ALONE, COPY, LINEAR, PART, Kind
from clean_transformer.parity.lowered import in_lower_precision, precision_of_products
from clean_transformer.parity.results import DeviceRun
from clean_transformer.parity.suite import check_device
from clean_transformer.parity.uses.judge import UseResult
from clean_transformer.parity.uses.table import Use
from clean_transformer.parity.verdict import Check, Verdict

from .small import F32, small_weights

WEIGHTS = small_weights(d_vocab=300, n_ctx=16)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eager", "optimized"])
@pytest.mark.parametrize(
    ("fault", "name"), [("matmul-tf32", "TF32"), ("matmul-bf16-inputs", "bfloat16")]
)
def test_a_lower_precision_is_no_wrong_result(monkeypatch, fault: str, name: str, mode: str):
    """With it, every use is less accurate, and none is wrong: the advice is a setting."""
    # The faults are in ATen's products, and some processors use another kernel.
    monkeypatch.setattr(fast_modules, "kernel_for", lambda *_: Matmul())
    with inject(fault):
        run = check_device(WEIGHTS, "cpu", F32, mode=mode)
    assert run.verdict is Verdict.DEGRADED, run.first_failure
    verdicts = {use.name: use.verdict for use in run.by_use}
    assert verdicts.pop("sampling") is Verdict.PASS
    assert {*verdicts.values()} == {Verdict.DEGRADED}
    rows = [row for use in run.uses for row in use.rows if isinstance(row, Isolated)]
    assert {row.lower_precision for row in rows if row.verdict.is_bad} == {name}


@pytest.mark.usefixtures("model_alone")
def test_another_fault_beside_it_is_wrong():
    with inject("matmul-tf32"), inject("gelu-tanh-ignored"):
        run = check_device(WEIGHTS, "cpu", F32)
    assert run.verdict is Verdict.WRONG
    assert run.by_use[0].verdict is Verdict.WRONG


def row(kind: Kind, ratio: float, precision: str = "") -> Isolated:
    limits = kind.limits(64, 2**-24)
    return Isolated("", "", "use", kind.name, ratio, *limits, ratio, 9.0, (0,), (), precision)


@pytest.mark.parametrize("named", ["", "TF32"])
@pytest.mark.parametrize(
    ("kind", "ratio", "verdict"),
    [
        (PART, 3.0, Verdict.PASS),
        (PART, 8 * 2.0**13, Verdict.DEGRADED),
        (PART, 8.1 * 2**13, Verdict.WRONG),
        (LINEAR, 1e4, Verdict.DEGRADED),
        (LINEAR, float("inf"), Verdict.WRONG),
        (COPY, 1e4, Verdict.WRONG),
    ],
)
def test_only_products_are_explained_and_only_up_to_a_limit(
    kind: Kind, ratio: float, verdict: Verdict, named: str
):
    use = Use("forward", "reading", 1, (9,))
    run = DeviceRun("cpu", "float32", isolated=[row(LINEAR, 1e4, named)])
    run = replace(run, uses=[UseResult(use, (row(kind, ratio),))])
    given = run.uses[0].verdict
    assert in_lower_precision(run).uses[0].verdict is (verdict if named else given)


@pytest.mark.parametrize(
    ("name", "ratio", "verdict"),
    [
        ("blocks.0", 8 * 2.0**13, Verdict.DEGRADED),
        ("blocks.0", 8.1 * 2**13, Verdict.WRONG),
        ("blocks.0.ln1", 1e3, Verdict.WRONG),
    ],
)
@pytest.mark.parametrize("named", ["", "TF32"])
def test_modules_whose_activations_cannot_be_watched(
    monkeypatch, name: str, ratio: float, verdict: Verdict, named: str
):
    monkeypatch.setattr(lowered, "precision_of_products", lambda device: named)
    given = replace(row(ALONE, ratio), name=name, path=BLACK_BOX)
    run = in_lower_precision(DeviceRun("cpu", "float32", "optimized", isolated=[given]))
    assert run.isolated[0].verdict is (verdict if named else given.verdict)


@pytest.mark.parametrize(
    ("fault", "name"), [("matmul-tf32", "TF32"), ("matmul-bf16-inputs", "bfloat16")]
)
def test_a_product_names_the_precision(fault: str, name: str):
    assert precision_of_products("cpu") == ""
    with inject(fault):
        assert precision_of_products("cpu") == name


@pytest.mark.parametrize(
    ("name", "measured", "verdict"),
    [
        ("linear 768, contiguous", 1e4, Verdict.DEGRADED),
        ("linear 768, contiguous", 1e6, Verdict.WRONG),
        ("linear 768, contiguous", None, Verdict.WRONG),
        ("gelu, contiguous", 1e4, Verdict.WRONG),
    ],
)
def test_single_operations(name: str, measured: float | None, verdict: Verdict):
    run = DeviceRun("cpu", "float32", isolated=[row(LINEAR, 1e4, "TF32")])
    run = replace(run, probes=[Check(name, Verdict.WRONG, measured)])
    assert in_lower_precision(run).probes[0].verdict is verdict


def test_invariants():
    run = DeviceRun("cpu", "float32", isolated=[row(LINEAR, 1e4, "TF32")])
    checks = [Check("causality", Verdict.WRONG, each, 1e-5) for each in (0.08, 0.09)]
    found = in_lower_precision(replace(run, invariants=checks)).invariants
    assert [each.verdict for each in found] == [Verdict.DEGRADED, Verdict.WRONG]
