"""The products of oneDNN, whose kernel does not run in float64, are compared with their formula."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clean_transformer.inference.matmuls import has_instructions, has_onednn, onednn_linear
from clean_transformer.parity.operations.check import check_operations
from clean_transformer.parity.operations.replay import operation_name
from clean_transformer.parity.verdict import Verdict

pytestmark = pytest.mark.skipif(not has_onednn(), reason="this build of PyTorch has no oneDNN")
HALVES = [each for each in (torch.bfloat16, torch.float16) if has_instructions(each)]

Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
PRODUCTS: dict[str, Product] = {
    "none": lambda x, W, b, y: onednn_linear().default(x, W, b, "none", [], ""),
    "no bias": lambda x, W, b, y: onednn_linear().default(x, W, None, "none", [], ""),
    "gelu": lambda x, W, b, y: onednn_linear().default(x, W, b, "gelu", [], "tanh"),
    "exact gelu": lambda x, W, b, y: onednn_linear().default(x, W, b, "gelu", [], "none"),
    "add": lambda x, W, b, y: onednn_linear().binary(x, y, W, b, "add"),
}


def drawn(rows: int, d_in: int, d_out: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, d_in), (d_out, d_in), (d_out,), (rows, d_out)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


class OffByOnePercent(TorchDispatchMode):
    """The last element of each of oneDNN's products is 1% of the largest too large."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if operation_name(func) == "_linear_pointwise":
            output[-1, -1] += 0.01 * output.abs().max()
        return output


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", PRODUCTS)
@given(sizes=st.tuples(*[st.integers(1, 40)] * 3), seed=st.integers(0, 99))
def test_a_healthy_product_passes(name: str, dtype: torch.dtype, sizes, seed: int):
    report = check_operations(PRODUCTS[name], *drawn(*sizes, dtype, seed))
    assert report.verdict is Verdict.PASS, report


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_wrong_product_is_wrong(name: str):
    with OffByOnePercent():
        report = check_operations(PRODUCTS[name], *drawn(3, 64, 16, torch.float32, seed=0))
    assert report.verdict is Verdict.WRONG
    assert report.finding is not None
    assert report.finding.call.name == "_linear_pointwise"


def test_what_follows_the_product_may_be_unknown():
    report = check_operations(
        lambda x, W, b, y: onednn_linear().default(x, W, b, "relu", [], ""),
        *drawn(3, 64, 16, torch.float32, seed=0),
    )
    assert report.verdict is Verdict.NOT_CHECKED
