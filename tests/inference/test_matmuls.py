import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clean_transformer.inference import matmuls
from clean_transformer.inference.matmuls import (
    Matmul,
    OneDNN,
    ThroughFloat32,
    has_instructions,
    kernel_for,
)

ANYWHERE = [Matmul(), ThroughFloat32(), ThroughFloat32(at_a_time=8)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIPSCHITZ_OF_GELU = 1.13


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("matmul", "dtype"),
    [
        *((matmul, dtype) for matmul in ANYWHERE for dtype in DTYPES),
        *((OneDNN(), dtype) for dtype in DTYPES[1:] if has_instructions(dtype)),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else type(value).__name__,
)
@given(
    sizes=st.tuples(*[st.integers(1, 33)] * 3), transposed=st.booleans(), seed=st.integers(0, 99)
)
@torch.no_grad()
def test_every_kernel_is_accurate(matmul, dtype, sizes, transposed: bool, seed: int):
    n_rows, d_in, d_out = sizes
    x, b = drawn(n_rows, d_in, seed=seed).to(dtype), drawn(d_out, seed=seed + 1).to(dtype)
    residual = drawn(n_rows, d_out, seed=seed + 2).to(dtype)
    W = drawn(d_in, d_out, seed=seed + 3).to(dtype)
    W = W.T.contiguous().T if transposed else W
    weight = matmul.prepare(W, b)
    before = residual.clone()

    pre, post = matmul(x, weight), matmul.gelu(x, weight)
    added = matmul.add(residual, x, weight)

    exact = x.double() @ W.double() + b.double()
    # d_in + 3 sums and products in any order, rounded to the dtype (Higham 2002, section 3.1).
    size = x.double().abs() @ W.double().abs() + b.double().abs() + residual.double().abs()
    unit = torch.finfo(dtype).eps / 2
    bound = (d_in + 3) * unit * size
    assert pre.dtype == post.dtype == added.dtype == dtype
    assert ((pre.double() - exact).abs() <= bound).all()
    assert ((added.double() - exact - residual.double()).abs() <= bound).all()
    gelu = torch.nn.functional.gelu(exact, approximate="tanh")
    # The GELU itself: a tanh and five products, next to 1 where the exact one is next to 0.
    assert (
        (post.double() - gelu).abs() <= LIPSCHITZ_OF_GELU * bound + 8 * unit * exact.abs()
    ).all()
    assert torch.equal(residual, before)


WITHOUT_ONEDNN = """
import torch
from torch._ops import _OpNamespace
find = _OpNamespace.__getattr__
def find_others(self, name):
    if self.name == "mkldnn":
        raise AttributeError(name)
    return find(self, name)
_OpNamespace.__getattr__ = find_others
import clean_transformer
"""


def test_a_build_without_onednn_can_import_it():
    subprocess.run([sys.executable, "-c", WITHOUT_ONEDNN], check=True)


@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_kernel_depends_on_dtype_device_and_instructions(monkeypatch, dtype, supported: bool):
    monkeypatch.setattr(matmuls, "has_instructions", lambda _: supported)
    in_half = dtype in (torch.bfloat16, torch.float16)

    kernel = kernel_for(dtype, torch.device("cpu"))

    assert type(kernel) is ((OneDNN if supported else ThroughFloat32) if in_half else Matmul)
    assert type(kernel_for(dtype, torch.device("cuda"))) is Matmul


def test_without_onednn_there_are_no_instructions(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not any(map(has_instructions, DTYPES[1:]))


def test_a_build_without_the_private_operations_uses_public_ones(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    x, W = drawn(8, 5, seed=0).bfloat16(), drawn(5, 3, seed=1).bfloat16()

    assert type(kernel_for(torch.bfloat16, torch.device("cpu"))) is ThroughFloat32
    weight = OneDNN().prepare(W, torch.zeros(3).bfloat16())
    assert torch.equal(OneDNN().gelu(x, weight), Matmul().gelu(x, weight))
