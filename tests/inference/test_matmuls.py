import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clean_transformer.inference import autotune as products
from clean_transformer.inference.autotune import Choice, Contender
from clean_transformer.inference.matmuls import (
    EachThreadItsInputs,
    InFloat32,
    Int8,
    OneDNN,
    Product,
    WithoutBias,
    in_8_bits,
)

ANYWHERE = [Product(), WithoutBias(), EachThreadItsInputs(2), InFloat32(), InFloat32(at_a_time=8)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIPSCHITZ_OF_GELU = 1.13


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("product", "dtype"),
    [
        *((product, dtype) for product in ANYWHERE for dtype in DTYPES),
        *((OneDNN(), dtype) for dtype in DTYPES if products.in_onednn(dtype)),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else type(value).__name__,
)
@given(
    sizes=st.tuples(*[st.integers(1, 33)] * 3), transposed=st.booleans(), seed=st.integers(0, 99)
)
@torch.no_grad()
def test_every_product_is_accurate(product, dtype, sizes, transposed: bool, seed: int):
    n_rows, d_in, d_out = sizes
    x, b = drawn(n_rows, d_in, seed=seed).to(dtype), drawn(d_out, seed=seed + 1).to(dtype)
    residual = drawn(n_rows, d_out, seed=seed + 2).to(dtype)
    W = drawn(d_in, d_out, seed=seed + 3).to(dtype)
    W = W.T.contiguous().T if transposed else W
    weight = product.prepare(W, b)
    before = residual.clone()

    pre, post = product(x, weight), product.gelu(x, weight)
    added = product.add(residual, x, weight)

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
    with pytest.raises(ValueError, match="single input"):
        Int8().prepare(torch.ones(1, 3), torch.zeros(3))


def test_a_row_of_zeros_in_8_bits_is_zeros():
    whole, step = in_8_bits(torch.tensor([[0.0, 0.0], [-2.0, 1.0]]))

    assert whole.tolist() == [[0, 0], [-127, 64]]
    assert step.tolist() == [[0.0], [pytest.approx(2 / 127)]]


def test_a_choice_goes_by_the_number_of_rows():
    few, many = Product(), InFloat32()
    choice = Choice({1: few, 64: many}, transposed=False)

    assert [choice(rows) for rows in (1, 63, 64, 1000)] == [few, few, many, many]


class Clock:
    """A clock that the products move, each by its own time for one row and for many."""

    now = 0.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(products, "perf_counter", lambda: self.now)
        self.calls: Counter[tuple[type, int]] = Counter()

    def race(
        self,
        seconds: dict[type, tuple[float, float]],
        orders: tuple[bool, ...] = (False,),
        gain: float = 1.0,
    ) -> dict[int, products.Times]:
        def run(contender: Contender, x: Tensor) -> int:
            product = type(contender.product)
            self.calls[product, len(x)] += 1
            taken = seconds[product][len(x) >= 64]
            self.now += taken / gain if contender.transposed else taken
            return 1

        contenders = [
            Contender(kind(2) if kind is EachThreadItsInputs else kind(), order)
            for order in orders
            for kind in seconds
        ]
        return products.race(contenders, run, 4, torch.float32)


def test_the_fastest_wins_and_the_hopeless_are_not_tried_again(monkeypatch):
    clock = Clock(monkeypatch)
    times = clock.race({Product: (3, 2), WithoutBias: (1, 5), InFloat32: (99, 0)})

    best = products.winners(times, transposed=False)
    assert [type(best(rows)) for rows in products.ROWS] == [WithoutBias] * 2 + [Product] * 2
    assert [products.least(times[rows], False) for rows in products.ROWS] == [1, 1, 2, 2]
    assert {rows for product, rows in clock.calls if product is InFloat32} == {1}


def test_who_is_for_few_rows_is_not_tried_at_many(monkeypatch):
    clock = Clock(monkeypatch)
    best = products.winners(clock.race({Product: (3, 2), EachThreadItsInputs: (1, 1)}), False)
    assert [type(best(rows)) for rows in products.ROWS] == [EachThreadItsInputs] * 2 + [Product] * 2
    assert {rows for product, rows in clock.calls if product is EachThreadItsInputs} == {1, 8}


def test_who_converts_the_weights_first_is_tried_at_many_rows(monkeypatch):
    times = Clock(monkeypatch).race({Product: (1, 4), InFloat32: (12, 2)})
    best = products.winners(times, transposed=False)
    assert [type(best(rows)) for rows in products.ROWS] == [Product] * 2 + [InFloat32] * 2


def test_a_race_lasts_until_luck_has_no_part_in_it(monkeypatch):
    clock = Clock(monkeypatch)
    clock.race({Product: (1 / 64, 1), WithoutBias: (1 / 32, 1), InFloat32: (1 / 8, 2)})
    # 0.1 seconds for each.
    assert clock.calls[Product, 1] == 7
    assert clock.calls[WithoutBias, 1] == 4
    assert clock.calls[InFloat32, 1] == 1
    # Of those that take longer, three turns for each that may be the fastest.
    assert clock.calls[Product, 512] == clock.calls[WithoutBias, 512] == 3
    assert clock.calls[InFloat32, 512] == 1


@pytest.mark.parametrize(("gain", "transposed"), [(1.2, True), (1.01, False), (0.1, False)])
def test_weights_are_copied_only_where_it_pays(monkeypatch, gain: float, transposed: bool):
    times = Clock(monkeypatch).race({Product: (1, 1)}, orders=(False, True), gain=gain)
    monkeypatch.setattr(products, "race", lambda *_: times)
    products.fastest_for_blocks.cache_clear()

    assert products.fastest_for_blocks(4, 8, 1, torch.float32, 1).transposed is transposed
    products.fastest_for_blocks.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_onednn_the_others_race(monkeypatch, dtype: torch.dtype):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)

    assert not any(isinstance(product, OneDNN) for product in products.candidates(dtype))


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_race_is_between_all_that_a_dtype_has(dtype: torch.dtype):
    blocks = products.fastest_for_blocks(8, 16, 2, dtype, 77)
    unembed = products.fastest_for_unembed(8, 11, dtype, 77)

    entered = {type(product) for product in products.candidates(dtype)}
    for choice in (blocks, unembed):
        assert {type(product) for product in choice.by_rows.values()} <= entered
        assert [*choice.by_rows] == [*products.ROWS]
