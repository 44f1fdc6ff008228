import math

import pytest
import torch

from clean_transformer.modules.mlp import MLP

from ..helpers import TINY, assert_gradients, assert_same_function, random_tensor, randomized


@pytest.mark.parametrize("layer", range(12))
def test_equals_transformer_lens(theirs, device, dtype, layer: int):
    block = f"blocks.{layer}"
    mlp = theirs.with_weights(MLP(theirs.cfg), f"{block}.mlp").to(device, dtype)
    output, cache = mlp.run_with_cache(theirs.normalized(f"{block}.ln2").to(device, dtype))
    assert_same_function(output, theirs.cache[f"{block}.hook_mlp_out"])
    for point in ("hook_pre", "hook_post"):
        assert_same_function(cache[point], theirs.cache[f"{block}.mlp.{point}"])


def formula(mlp: MLP, x: torch.Tensor) -> torch.Tensor:
    pre = x @ mlp.W_in + mlp.b_in
    inner = math.sqrt(2 / math.pi) * (pre + 0.044715 * pre**3)
    return (0.5 * pre * (1 + inner.tanh())) @ mlp.W_out + mlp.b_out


@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
def test_is_the_formula(shape: tuple[int, int]):
    mlp, x = randomized(MLP(TINY)), random_tensor(*shape, TINY.d_model)
    assert_same_function(mlp(x), formula(mlp, x))


def test_gelu_is_not_the_exact_one():
    mlp = MLP(TINY).double()
    _, cache = mlp.run_with_cache(10 * random_tensor(2, 5, TINY.d_model, seed=3) / 0.02)
    pre, post = cache["pre"], cache["post"]
    exact = pre * (1 + (pre / math.sqrt(2)).erf()) / 2
    assert 1e-5 < (post - exact).abs().max() < 5e-4


def test_hook_shapes():
    _, cache = MLP(TINY).run_with_cache(torch.ones(2, 5, TINY.d_model))
    assert {name: [*value.shape] for name, value in cache.items()} == {
        "hook_pre": [2, 5, TINY.d_mlp],
        "hook_post": [2, 5, TINY.d_mlp],
    }


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half: torch.dtype):
    mlp, x = randomized(MLP(TINY), half), random_tensor(2, 5, TINY.d_model, dtype=half)
    output, exact_mlp = mlp(x), randomized(MLP(TINY), half).double()
    assert output.dtype == half
    # Sums of 12 and of 20 products, rounded to half by half a unit each, of those magnitudes; the
    # GELU passes an error on at most 1.13 times and adds one rounding.
    magnitude_in = x.double().abs() @ exact_mlp.W_in.abs() + exact_mlp.b_in.abs()
    magnitude = magnitude_in @ exact_mlp.W_out.abs() + exact_mlp.b_out.abs()
    bound = (12 * 1.13 + 1 + 20) * torch.finfo(half).eps / 2 * magnitude
    assert ((output.double() - formula(exact_mlp, x.double())).abs() <= bound).all()


def test_gradients():
    assert_gradients(randomized(MLP(TINY)), random_tensor(1, 2, TINY.d_model))
