import pickle
import subprocess
import sys
from copy import deepcopy
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
    OneDNNGelu,
    ThroughFloat32,
    has_instructions,
    has_onednn,
    kernel_for,
    mkl_reads_with_one_thread,
)

from ..helpers import assert_same_function, unchecked_types

ANYWHERE = [Matmul(), ThroughFloat32(), ThroughFloat32(at_a_time=8)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IN_ONEDNN = [dtype for dtype in DTYPES[1:] if has_instructions(dtype)]
needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this build of PyTorch has no oneDNN")
LIPSCHITZ_OF_GELU = 1.13


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("matmul", "dtype"),
    [
        *((matmul, dtype) for matmul in ANYWHERE for dtype in DTYPES),
        *((kernel, dtype) for kernel in (OneDNN(), OneDNNGelu()) for dtype in IN_ONEDNN),
        pytest.param(OneDNN(), torch.float32, marks=needs_onednn),
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


@pytest.mark.parametrize("one_thread", [True, False])
@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_kernel_depends_on_dtype_device_and_processor(
    monkeypatch, dtype, supported: bool, one_thread: bool
):
    monkeypatch.setattr(matmuls, "has_instructions", lambda _: supported)
    monkeypatch.setattr(matmuls, "mkl_reads_with_one_thread", lambda: one_thread)
    monkeypatch.setattr(matmuls, "has_onednn", lambda: True)

    kernel = kernel_for(dtype, torch.device("cpu"))

    if dtype in (torch.bfloat16, torch.float16):
        assert type(kernel) is (OneDNNGelu if supported else ThroughFloat32)
    else:
        assert type(kernel) is (OneDNN if one_thread and dtype == torch.float32 else Matmul)
    assert type(kernel_for(dtype, torch.device("cuda"))) is Matmul


@needs_onednn
def test_who_turns_onednn_off_gets_another_kernel(monkeypatch):
    monkeypatch.setattr(matmuls, "mkl_reads_with_one_thread", lambda: True)
    assert type(kernel_for(torch.float32, torch.device("cpu"))) is OneDNN
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert type(kernel_for(torch.float32, torch.device("cpu"))) is Matmul


@pytest.mark.parametrize(
    ("name", "is_amd"),
    [
        ("AMD EPYC", True),
        ("AMD64 Family 25 Model 33 Stepping 2, AuthenticAMD", True),
        ("Intel(R) Xeon(R) Processor", False),
        ("Intel64 Family 6 Model 85 Stepping 7, GenuineIntel", False),
        ("AMD64", False),
    ],
)
@pytest.mark.parametrize("has_mkl", [True, False])
def test_only_mkl_on_amd_reads_with_one_thread(monkeypatch, name, is_amd: bool, has_mkl: bool):
    monkeypatch.setattr(matmuls, "processor", lambda: name)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    assert mkl_reads_with_one_thread() is (has_mkl and is_amd)


@pytest.mark.parametrize("kernel", [*ANYWHERE, OneDNN(), OneDNNGelu()], ids=lambda k: type(k))
def test_a_kernel_can_be_copied_and_pickled(kernel: Matmul):
    """With an optimized model, for example."""
    assert type(deepcopy(kernel)) is type(pickle.loads(pickle.dumps(kernel))) is type(kernel)


@pytest.mark.slow
@needs_onednn
@torch.no_grad()
def test_a_graph_calls_onednn():
    x, residual, b = drawn(1, 64, seed=0), drawn(1, 64, seed=1), drawn(64, seed=2)
    kernel = OneDNN()
    weight = kernel.prepare(drawn(64, 64, seed=3), b)

    def run(x: Tensor, residual: Tensor) -> Tensor:
        return kernel.add(residual, kernel.gelu(kernel(x, weight), weight), weight)

    with unchecked_types(), torch.profiler.profile() as profiler:
        found = torch.compile(run, fullgraph=True)(x, residual)
    assert_same_function(found, run(x, residual))
    calls = {event.key: event.count for event in profiler.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == 3


def test_without_onednn_there_are_no_instructions(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not any(map(has_instructions, DTYPES[1:]))


def test_a_build_without_the_private_operations_uses_public_ones(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    x, W = drawn(8, 5, seed=0).bfloat16(), drawn(5, 3, seed=1).bfloat16()

    assert type(kernel_for(torch.bfloat16, torch.device("cpu"))) is ThroughFloat32
    weight = OneDNNGelu().prepare(W, torch.zeros(3).bfloat16())
    assert torch.equal(OneDNNGelu().gelu(x, weight), Matmul().gelu(x, weight))

    monkeypatch.setattr(matmuls, "mkl_reads_with_one_thread", lambda: True)
    assert type(kernel_for(torch.float32, torch.device("cpu"))) is Matmul
