from typing import Any

import pytest
import torch

from clean_transformer.parity.operations import probes
from clean_transformer.parity.operations.probes import PROBES, run_probes
from clean_transformer.parity.operations.script import reproduction_script
from clean_transformer.parity.verdict import Verdict

from .. import faulty_devices as faulty
from ..faulty_devices import Faulty, RefusesFloat64

# Every kind of operation and one size of attention, to be quick.
FEW = [
    probe
    for probe in PROBES
    if "scaled_dot_product_attention" not in probe.name or " 8x1024" in probe.name
]


def test_every_probe_of_a_healthy_device_passes_without_float64() -> None:
    with RefusesFloat64():
        results = run_probes("cpu", torch.float32)
    assert {result.name for result in results} == {probe.name for probe in PROBES}
    assert [result for result in results if result.verdict is not Verdict.PASS] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PROBES", FEW)
    assert {result.verdict for result in run_probes("cpu", dtype)} == {Verdict.PASS}


@pytest.mark.parametrize(
    ("name", "spoil", "caught"),
    [
        ("mm", faulty.noncontiguous_second_operand, ("matmul 768", "argument 2 transposed")),
        ("mm", faulty.only_the_first_1024_columns, ("matmul 1025", "contiguous")),
        ("gelu", faulty.noncontiguous_input, ("gelu", "all transposed")),
        ("native_layer_norm", faulty.ignored_storage_offset, ("layer_norm", "argument 1 offset")),
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            faulty.leaks_the_future,
            ("scaled_dot_product_attention 8x1024, is_causal", "contiguous"),
        ),
        ("where", faulty.noncontiguous_input, ("where", "argument 1 transposed")),
        ("argmax", faulty.int64_min, ("argmax", "contiguous")),
        ("multinomial", faulty.int64_min, ("multinomial", "offset")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_is_caught_by_the_probe_of_its_layout(
    name: str,
    spoil: Any,
    caught: tuple[str, str],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "PROBES", [p for p in FEW if p.name == caught[0]])
    with Faulty(name, spoil):
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
