import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clean_transformer.config import Config
from clean_transformer.modules.layer_norm import NORMALIZATIONS, LayerNorm, LayerNormPre

from ..helpers import (
    TINY,
    assert_gradients,
    assert_same_function,
    random_tensor,
    randomized,
    tiny,
    watch_everything,
)

BOTH = pytest.mark.parametrize("kind", [LayerNorm, LayerNormPre])
PLACES = [
    (f"blocks.{layer}.{name}", f"blocks.{layer}.{stream}")
    for layer in range(12)
    for name, stream in (("ln1", "hook_resid_pre"), ("ln2", "hook_resid_mid"))
] + [("ln_final", "blocks.11.hook_resid_post")]


@pytest.mark.parametrize(("place", "stream"), PLACES)
def test_equals_transformer_lens(theirs, device, dtype, place: str, stream: str):
    if f"{place}.hook_scale" not in theirs.cache:
        pytest.skip("transformers is the reference, and caches no hook_scale")
    ln = theirs.with_weights(LayerNorm(theirs.cfg), place).to(device, dtype)
    residual = theirs.cache[stream].to(device, dtype)
    assert_same_function(ln(residual), theirs.normalized(place))

    output, cache = ln.run_with_cache(residual)
    assert_same_function(output, theirs.normalized(place))
    for point in ("scale", "normalized"):
        expected = theirs.cache[f"{place}.hook_{point}"]
        # HookedTransformer normalizes once per head where the heads' inputs may differ.
        expected = expected[:, :, 0] if expected.ndim == 4 else expected
        assert_same_function(cache[point], expected)
    assert_same_function(LayerNormPre(theirs.cfg)(residual), cache["normalized"])


def formula(ln: LayerNormPre, x: torch.Tensor) -> torch.Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    normalized = (x - mean) / (variance + ln.eps) ** 0.5
    return normalized * ln.w + ln.b if isinstance(ln, LayerNorm) else normalized


@BOTH
@given(
    d_model=st.integers(2, 9),
    leading=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    eps=st.sampled_from([1e-5, 1e-2, 1.0]),
)
def test_both_paths_are_the_formula(kind, d_model: int, leading: list[int], eps: float):
    cfg = Config(**tiny(n_heads=1).to_dict() | {"d_model": d_model, "d_head": d_model, "eps": eps})
    ln, x = randomized(kind(cfg)), random_tensor(*leading, d_model)
    expected = formula(ln, x)
    assert_same_function(ln(x), expected)
    watch_everything(ln)
    assert_same_function(ln(x), expected)


@BOTH
def test_constant_rows_become_the_bias(kind):
    ln, row = randomized(kind(TINY)), torch.full((1, 1, TINY.d_model), 7.0, dtype=torch.float64)
    bias = ln.b if kind is LayerNorm else torch.zeros(TINY.d_model, dtype=torch.float64)
    assert torch.equal(ln(row)[0, 0], bias)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@BOTH
def test_half_precision_normalizes_in_float32(kind, half: torch.dtype):
    ln = randomized(kind(TINY), half)
    # The square of 3,000 overflows float16.
    x = (random_tensor(2, 3, TINY.d_model) * 3000).to(half)
    exact = formula(randomized(kind(TINY), half).double(), x.double())
    output, cache = ln.run_with_cache(x)
    assert cache["scale"].dtype == cache["normalized"].dtype == torch.float32
    # At most three roundings to half: the normalized value, times w, plus b; each by half a unit.
    # float32's own are less than a thousandth of that.
    magnitude = exact.abs() + 2 * getattr(ln, "b", torch.zeros(())).double().abs()
    bound = 3 * torch.finfo(half).eps / 2 * magnitude
    for result in (output, ln(x)):
        assert result.dtype == half
        assert ((result.double() - exact).abs() <= bound * (1 + 1e-3)).all()


@BOTH
@pytest.mark.parametrize("watched", [False, True])
def test_gradients(kind, watched: bool):
    ln = randomized(kind(TINY))
    if watched:
        watch_everything(ln)
    assert_gradients(ln, random_tensor(2, 3, TINY.d_model))


@BOTH
def test_hook_shapes(kind):
    _, cache = kind(TINY).run_with_cache(torch.ones(2, 3, TINY.d_model))
    assert {name: [*value.shape] for name, value in cache.items()} == {
        "hook_scale": [2, 3, 1],
        "hook_normalized": [2, 3, TINY.d_model],
    }


def test_starts_as_the_plain_normalization():
    x = random_tensor(2, 3, TINY.d_model)
    assert torch.equal(LayerNorm(TINY).double()(x), LayerNormPre(TINY)(x))


def test_chosen_by_the_normalization_type():
    assert {"LN": LayerNorm, "LNPre": LayerNormPre} == NORMALIZATIONS
    assert not LayerNormPre(TINY).state_dict()
