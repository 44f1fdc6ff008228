import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clean_transformer.inference import matmuls
from clean_transformer.inference.matmuls import (
    Int8,
    Matmul,
    OneDNN,
    ThroughFloat32,
    has_instructions,
    kernel_for,
    to_int8,
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


@pytest.mark.parametrize("dtype", DTYPES)
@given(sizes=st.tuples(*[st.integers(2, 33)] * 3), seed=st.integers(0, 99))
def test_8_bits_are_off_by_half_a_step_of_each_factor(
    dtype: torch.dtype, sizes: tuple[int, int, int], seed: int
):
    n_rows, d_in, d_out = sizes
    x, W = drawn(n_rows, d_in, seed=seed).to(dtype), drawn(d_in, d_out, seed=seed + 1).to(dtype)
    b = torch.ones(d_out, dtype=dtype)

    output = Int8()(x, Int8().prepare(W, b))

    assert output.dtype == dtype
    x, W, b = x.double(), W.double(), b.double()
    half_x = x.abs().amax(dim=1, keepdim=True) / 254
    half_W = W.abs().amax(dim=0) / 254
    bound = x.abs().sum(dim=1, keepdim=True) * half_W + W.abs().sum(dim=0) * half_x
    bound += d_in * half_x * half_W
    # Six products and sums in float32, and the rounding of what comes out.
    size = x.abs() @ W.abs() + b + bound
    rounding = (6 * 2**-24 + torch.finfo(dtype).eps / 2) * size
    error = (output.double() - x @ W - b).abs()
    assert (error <= bound + rounding).all()
    assert error.any()


def test_8_bits_of_large_activations_do_not_overflow_half_precision():
    x, W = torch.full((1, 4096), 8.0).half(), torch.full((4096, 2), 0.5).half()

    output = Int8()(x, Int8().prepare(W, torch.zeros(2).half()))

    assert output.tolist() == [[16384.0, 16384.0]]


def test_8_bits_of_a_single_input_are_refused():
    with pytest.raises(ValueError, match="8-bit weights need 2 or more input features"):
        Int8().prepare(torch.ones(1, 3), torch.zeros(3))


def test_a_row_of_zeros_in_8_bits_is_zeros():
    whole, step = to_int8(torch.tensor([[0.0, 0.0], [-2.0, 1.0]]))

    assert whole.tolist() == [[0, 0], [-127, 64]]
    assert step.tolist() == [[0.0], [pytest.approx(2 / 127)]]


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
