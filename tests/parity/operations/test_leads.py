"""Leads: the known issues and the setting that a finding names come from the device at hand."""

import platform
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clean_transformer.parity.faults import DEVICE_FAULTS
from clean_transformer.parity.faults.corruptions import (
    as_if_contiguous,
    rounded,
    with_factors,
    with_result,
)
from clean_transformer.parity.operations.check import first_wrong_operation
from clean_transformer.parity.operations.diagnosis import Cause, Finding
from clean_transformer.parity.operations.known_issue import ARM, ROCM, X86
from clean_transformer.parity.operations.known_issues import KNOWN_ISSUES
from clean_transformer.parity.operations.leads import describe_issue, emulating, match
from clean_transformer.reports.environment import float32_precision

from ..small import broken

KINDS = {"mps", "cuda", ROCM, "xpu", ARM, X86}


def sample(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def garbage(name: str = "mm") -> Finding:
    with broken(name, with_result(lambda product: product.roll(1, 0))):
        found = first_wrong_operation(torch.mm, sample(9, 64), sample(64, 64))
    assert found is not None
    return found


def layout() -> Finding:
    with broken("mm", with_factors(as_if_contiguous)):
        found = first_wrong_operation(torch.mm, sample(9, 64), sample(64, 64).T)
    assert found is not None
    return found


def tf32() -> Finding:
    with broken("mm", with_factors(rounded(10))):
        found = first_wrong_operation(torch.mm, sample(33, 64), sample(64, 64))
    assert found is not None
    return found


def names(finding: Finding, *kinds: str) -> list[str]:
    with emulating(kinds):
        return [issue.name for issue in match(finding)]


def test_every_issue_has_known_devices_and_an_emulation() -> None:
    assert all({*issue.devices} <= KINDS and issue.devices for issue in KNOWN_ISSUES)
    emulated = {fault.name: fault.devices for fault in DEVICE_FAULTS}
    # A CPU has this fault itself (`test_optimizer_layout.py`).
    rest = [issue for issue in KNOWN_ISSUES if issue.name != "fused-optimizer-layout"]
    assert all(emulated[issue.name] == issue.devices for issue in rest)


def test_an_issue_of_another_device_is_no_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "linear-noncontiguous-weight" in names(layout(), "mps")
    for machine in ("x86_64", "AMD64", "arm64", "aarch64", "riscv64"):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert names(layout()) == names(tf32()) == names(garbage()) == []
    assert names(tf32(), "cuda") == ["matmul-tf32"]
    assert names(tf32(), "mps") == []


def test_x86_and_arm_have_issues_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def first_only(result: Tensor) -> Tensor:
        calls.append(result)
        return result * 1.001 if len(calls) == 1 else result

    with broken("exp", with_result(first_only)):
        finding = first_wrong_operation(torch.exp, sample(64))
    assert finding is not None
    assert finding.cause is Cause.FIRST_CALL
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert names(finding) == ["first-call-imprecise"]
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert names(finding) == []


def test_a_lead_does_not_contradict_the_retries() -> None:
    """TF32 is named for TF32's errors only, and .contiguous() only where it helps."""
    assert (garbage().cause, layout().cause, tf32().cause) == (
        Cause.VALUES,
        Cause.LAYOUT,
        Cause.TF32,
    )
    assert names(garbage(), "cuda", "mps") == []
    assert names(layout(), "cuda", "mps") == ["linear-noncontiguous-weight"]
    with broken("mm", with_result(lambda product: product.roll(1, 0))):
        finding = first_wrong_operation(torch.mm, sample(9, 64), sample(64, 64).T)
    assert finding is not None
    assert "contiguous" not in finding.diagnosis
    assert names(finding, "cuda", "mps") == []


def test_an_issue_that_is_fixed_says_so_and_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    issue = next(issue for issue in KNOWN_ISSUES if issue.name == "linear-noncontiguous-weight")
    version = torch.torch_version.TorchVersion
    monkeypatch.setattr(torch, "__version__", version("2.8.0"))
    assert not issue.is_fixed
    assert describe_issue(issue) == (
        "linear-noncontiguous-weight: pytorch#161640 on mps, since torch 2.8.0, fixed in torch 2.9;"
        " Call .contiguous() on the weight."
    )
    monkeypatch.setattr(torch, "__version__", version("2.13.0+cpu"))
    assert issue.is_fixed
    assert "fixed in torch 2.9 (this is torch 2.13.0+cpu: it is back, or this" in (
        describe_issue(issue)
    )
    assert not replace(issue, fixed_in="").is_fixed


def test_an_issue_names_its_dtypes_and_an_older_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    issue = next(issue for issue in KNOWN_ISSUES if issue.name == "sdpa-bf16-arm")
    version = torch.torch_version.TorchVersion
    monkeypatch.setattr(torch, "__version__", version("2.12.0"))
    assert not issue.is_newer
    assert " on arm in bfloat16, since torch 2.12; Use" in describe_issue(issue)
    monkeypatch.setattr(torch, "__version__", version("2.4.1+cpu"))
    assert issue.is_newer
    assert "since torch 2.12 (this is torch 2.4.1+cpu: nobody" in describe_issue(issue)


def test_an_issue_of_another_dtype_does_not_match() -> None:
    issue = next(issue for issue in KNOWN_ISSUES if issue.name == "matmul-tf32")
    call = garbage().call
    assert issue.matches(call)
    assert not replace(issue, dtypes=(torch.float16,)).matches(call)


@pytest.fixture
def medium() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("medium")
def test_the_setting_at_work_is_named() -> None:
    """The emulation rounds as oneDNN does if PyTorch's setting allows bfloat16."""

    def emulate(func, args, options) -> Tensor:
        lowered = next(iter(float32_precision("cpu").values())) in ("bf16", "medium")
        return with_factors(rounded(7))(func, args, options) if lowered else func(*args, **options)

    with broken("mm", emulate):
        finding = first_wrong_operation(torch.mm, sample(33, 64), sample(64, 64))
    assert finding is not None
    ((name, value),) = float32_precision("cpu").items()
    assert finding.diagnosis == (f"computed in bfloat16 precision, because {name} is {value!r}")
    assert torch.get_float32_matmul_precision() == "medium"


def test_an_environment_variable_is_named_if_no_setting_explains_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tf32().diagnosis == "computed in TF32 precision"
    monkeypatch.setenv("DNNL_DEFAULT_FPMATH_MODE", "TF32")
    assert tf32().diagnosis == (
        "computed in TF32 precision; the environment has DNNL_DEFAULT_FPMATH_MODE=TF32"
    )
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "ANY")
    assert tf32().diagnosis.endswith("ONEDNN_DEFAULT_FPMATH_MODE=ANY")
