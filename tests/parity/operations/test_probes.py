from typing import Any

import pytest
import torch
from torch import Tensor

from clean_transformer.parity.faults import inject
from clean_transformer.parity.faults.corruptions import attending, with_result
from clean_transformer.parity.operations import probes
from clean_transformer.parity.operations.leads import match
from clean_transformer.parity.operations.probes import PROBES, run_probes
from clean_transformer.parity.operations.script import reproduction_script
from clean_transformer.parity.verdict import Verdict

from ...helpers import needs_torch
from ..small import broken, no_float64

FLASH = "_scaled_dot_product_flash_attention_for_cpu"

# Every kind of operation and one size of attention, to be quick.
FEW = [
    probe
    for probe in PROBES
    if "scaled_dot_product_attention" not in probe.name
    or " 8x1024" in probe.name
    or "without a key" in probe.name
]


@pytest.mark.slow
def test_every_probe_of_a_healthy_device_passes_without_float64() -> None:
    with no_float64():
        results = run_probes("cpu", torch.float32)
    assert {result.name for result in results} == {probe.name for probe in PROBES}
    assert [result for result in results if result.verdict is not Verdict.PASS] == []


def zero_past_1024(product: Tensor) -> Tensor:
    return torch.where(torch.arange(product.shape[-1]) < 1024, product, 0.0)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16)),
    ],
)
def test_a_healthy_device_passes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PROBES", FEW)
    assert {result.verdict for result in run_probes("cpu", dtype)} == {Verdict.PASS}


@pytest.mark.parametrize(
    ("fault", "name", "caught"),
    [
        (inject("linear-noncontiguous-weight"), "mm", ("matmul 768", "argument 2 transposed")),
        (broken("mm", with_result(zero_past_1024)), "mm", ("matmul 1025", "contiguous")),
        (inject("gelu-noncontiguous-input"), "gelu", ("gelu", "all transposed")),
        (
            inject("layer-norm-storage-offset"),
            "native_layer_norm",
            ("layer_norm", "argument 1 offset"),
        ),
        (
            broken(FLASH, attending(lambda query, key, n_keys: key > query + 3)),
            FLASH,
            ("scaled_dot_product_attention 8x1024, is_causal", "contiguous"),
        ),
        (inject("where-noncontiguous-condition"), "where", ("where", "argument 1 transposed")),
        (inject("argmax-int64-min"), "argmax", ("argmax", "contiguous")),
        (inject("multinomial-int64-min"), "multinomial", ("multinomial", "offset")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_is_caught_by_the_probe_of_its_layout(
    fault: Any,
    name: str,
    caught: tuple[str, str],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "PROBES", [p for p in FEW if p.name == caught[0]])
    with fault:
        wrong = {
            result.layout: result
            for result in run_probes("cpu", dtype)
            if result.verdict is Verdict.WRONG
        }
        finding = wrong[caught[1]].finding
        assert finding is not None
        assert finding.call.name == name
        script = compile(reproduction_script(finding), "reproduction", "exec")
        with pytest.raises(AssertionError):
            exec(script, {})
    exec(script, {})


@needs_torch("2.5", "attention of a query without a key is not 0")
def test_a_query_without_a_key_must_have_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PROBES", [p for p in FEW if "without a key" in p.name])

    def undefined(output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        output[0][..., 0, :] = torch.nan
        return output

    for operation in (FLASH, f"{FLASH}_backward"):
        with broken(operation, with_result(undefined)):
            assert {r.verdict for r in run_probes("cpu", torch.float32)} == {Verdict.WRONG}


def test_one_row_that_ignores_alpha_is_caught_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated fault is that of torch 2.4.1 on Arm, which `make test-arm` runs."""
    monkeypatch.setattr(
        probes, "PROBES", [p for p in PROBES if "alpha" in p.name or "1 row, beta" in p.name]
    )
    with inject("half-product-alpha-ignored"):
        wrong = [r for r in run_probes("cpu", torch.float16) if r.verdict is Verdict.WRONG]
        assert {(result.name, result.layout) for result in wrong} == {
            (f"{name}, 1 row, beta 0", layout)
            for name in ("addmm", "baddbmm")
            for layout in ("all transposed", "argument 3 transposed")
        }
        for finding in (result.finding for result in wrong):
            assert finding is not None
            assert [issue.name for issue in match(finding)] == ["half-product-alpha-ignored"]
            with pytest.raises(AssertionError):
                exec(compile(reproduction_script(finding), "reproduction", "exec"), {})
        assert {r.verdict for r in run_probes("cpu", torch.bfloat16)} == {Verdict.PASS}
