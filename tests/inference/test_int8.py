import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clean_transformer.inference import int8
from clean_transformer.inference.int8 import GROUP, MOST_ROWS, Int8, NoInt8Kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def kernels() -> list[Int8]:
    """With the C++ kernel where a compiler is there, and without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoInt8Kernel)
        compiled = Int8()
    converting = Int8()
    converting.few_rows = None
    return [compiled, converting]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(W: Tensor) -> Tensor:
    """W as its 8-bit copy holds it."""
    weight = Int8().prepare(W, torch.zeros(W.shape[1]))
    return weight.floats(len(W))[:, : W.shape[1]]


@given(sizes=st.tuples(st.integers(1, 70), st.integers(1, 130)), seed=st.integers(0, 99))
def test_a_weight_is_off_by_half_a_step_of_its_group(sizes: tuple[int, int], seed: int):
    W = drawn(*sizes, seed=seed)

    off = (rounded(W).double() - W.double()).abs()

    for first in range(0, len(W), GROUP):
        group = W[first : first + GROUP].double()
        # Half a step, which is rounded to bfloat16, and rounding to float32 of W / step.
        bound = group.abs().amax(dim=0) / 254 * (1 + 2**-8) * (1 + 2**-15)
        assert (off[first : first + GROUP] <= bound).all()


@given(seed=st.integers(0, 99))
def test_rounding_twice_is_rounding_once(seed: int):
    once = rounded(drawn(70, 130, seed=seed))

    assert torch.equal(rounded(once), once)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    n_rows=st.integers(1, MOST_ROWS + 2),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 130)),
    seed=st.integers(0, 99),
)
def test_only_the_weights_are_rounded(kernels, dtype, n_rows: int, sizes, seed: int):
    d_in, d_out = sizes
    x, W = drawn(n_rows, d_in, seed=seed).to(dtype), drawn(d_in, d_out, seed=seed + 1).to(dtype)
    b, residual = torch.ones(d_out, dtype=dtype), drawn(n_rows, d_out, seed=seed + 2).to(dtype)
    exact_W = rounded(W).double()
    size = x.double().abs() @ exact_W.abs() + b.double()
    # d_in + 4 products and sums in float32 in any order, then the rounding of what comes out.
    bound = (d_in + 4) * 2**-24 * size + torch.finfo(dtype).eps / 2 * size

    for kernel in kernels:
        weight = kernel.prepare(W, b)
        output, added = kernel(x, weight), kernel.add(residual, x, weight)

        exact = x.double() @ exact_W + b.double()
        assert output.dtype == added.dtype == dtype
        assert ((output.double() - exact).abs() <= bound).all()
        more = torch.finfo(dtype).eps / 2 * (size + residual.double().abs())
        assert ((added.double() - exact - residual.double()).abs() <= bound + more).all()


def test_large_activations_do_not_overflow_half_precision(kernels):
    x, W = torch.full((1, 4096), 8.0).half(), torch.full((4096, 2), 0.5).half()

    for kernel in kernels:
        output = kernel(x, kernel.prepare(W, torch.zeros(2).half()))
        assert output.flatten().tolist() == pytest.approx([16384.0, 16384.0], rel=2**-8)


def test_a_group_of_zeros_is_zeros():
    assert not rounded(torch.zeros(20, 3)).any()


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    with pytest.warns(NoInt8Kernel, match="8-bit weights are slow here"):
        assert int8.compiled_kernel.__wrapped__() is None
