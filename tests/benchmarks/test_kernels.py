"""The script that shows why each kernel is used."""

import pytest
import torch

from benchmarks import kernels
from clean_transformer.inference.matmuls import (
    Matmul,
    OneDNN,
    OneDNNGelu,
    ThroughFloat32,
    has_onednn,
    kernel_for,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "D_MODEL", 64)
    monkeypatch.setattr(kernels, "D_MLP", 128)
    monkeypatch.setattr(kernels, "ROWS", (1, 8))


def test_it_prints_each_kernel_by_dtype_and_rows(capsys: pytest.CaptureFixture[str]):
    before = torch.get_num_threads()
    kernels.main(rounds=1)
    torch.set_num_threads(before)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[1:7]] == [
        [dtype, rows] for dtype in ("float32", "bfloat16", "float16") for rows in ("1", "8")
    ]
    assert lines[1][-1] == type(kernel_for(torch.float32, torch.device("cpu"))).__name__
    names = [" ".join(line[:-1]) for line in lines[-6:]]
    assert names == [*kernels.readers()]


@pytest.mark.parametrize(
    "kernel",
    [Matmul(), ThroughFloat32(), *((OneDNN(), OneDNNGelu()) if has_onednn() else ())],
    ids=lambda k: type(k),
)
def test_all_kernels_compute_the_same_block(kernel: Matmul):
    torch.manual_seed(0)
    expected = kernels.block(Matmul(), torch.float32, 8)()
    torch.manual_seed(0)
    found = kernels.block(kernel, torch.float32, 8)()
    # Sums of at most 128 products, in any order, of numbers below 10.
    assert (found - expected).abs().max() <= 4 * 128 * 2**-24 * 10
    assert found.abs().max() < 10
