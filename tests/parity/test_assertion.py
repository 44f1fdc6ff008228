"""`assert_parity` in other people's tests: passing, failing with the first divergence, skipping."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import clean_transformer
from clean_transformer import variants
from clean_transformer.config import Config
from clean_transformer.inference.fast_modules import FastBlock
from clean_transformer.modules.attention import Attention
from clean_transformer.modules.mlp import MLP
from clean_transformer.parity import assert_parity, inject

from ..helpers import random_model, random_tokens

pytest_plugins = ["pytester"]

CFG = Config(n_layers=1, n_heads=2, d_model=32, d_head=16, d_mlp=64)


class TheirMLP(nn.Module):
    """Somebody's port: plain linear layers, no hook points."""

    def __init__(self, mlp: MLP, approximate: str):
        super().__init__()
        self.mlp, self.approximate = mlp, approximate

    def forward(self, x: Tensor) -> Tensor:
        pre = nn.functional.linear(x, self.mlp.W_in.T, self.mlp.b_in)
        post = nn.functional.gelu(pre, approximate=self.approximate)
        return nn.functional.linear(post, self.mlp.W_out.T, self.mlp.b_out)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_modules_pass_and_stay_as_they_are(x: Tensor, dtype: torch.dtype):
    mlp, attention = MLP(CFG), Attention(CFG)
    assert_parity(TheirMLP(mlp, "tanh"), x, reference=mlp, device="cpu", dtype=dtype)
    assert_parity(attention, x, device="cpu", dtype=dtype)
    assert attention.W_Q.dtype == torch.float32


def test_another_function_is_named_with_its_distance(x: Tensor):
    mlp = MLP(CFG)
    with torch.no_grad():
        mlp.W_in.mul_(50)  # exact and approximate GELU differ where its input is not near zero
    message = r"TheirMLP is not the function of MLP: in float64 the outputs differ by \d"
    with pytest.raises(AssertionError, match=message):
        assert_parity(TheirMLP(mlp, "none"), x, reference=mlp, device="cpu")


def test_a_wrong_device_is_named_with_the_activation_and_the_operation(x: Tensor):
    with inject("gelu-tanh-ignored"), pytest.raises(AssertionError) as failure:
        assert_parity(MLP(CFG), 100 * x, device="cpu")
    message = str(failure.value)
    assert message.startswith("MLP on cpu in float32 is WRONG: hook_post (gelu_new; ")
    assert "aten.gelu.default" in message


class Same(MLP):
    """A subclass that changes nothing."""


class ReluMLP(MLP):
    """The module of a README."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.W_in + self.b_in).relu() @ self.W_out + self.b_out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Same, ReluMLP, variants.RMSNorm, variants.SwigluMLP])
def test_a_module_of_anybody_is_judged_by_what_it_computes(kind: type, dtype: torch.dtype):
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    assert_parity(kind(CFG), x, device="cpu", dtype=dtype)


def test_a_subclass_is_judged_by_the_formula_of_its_parent(x: Tensor):
    with (
        inject("gelu-tanh-ignored"),
        pytest.raises(
            AssertionError, match=r"Same on cpu in float32 is WRONG: hook_post \(gelu_new"
        ),
    ):
        assert_parity(Same(CFG), 100 * x, device="cpu")


@pytest.mark.parametrize("kind", [Same, ReluMLP])
def test_one_weight_off_by_a_percent_is_another_function(kind: type, x: Tensor):
    mine, reference = kind(CFG), kind(CFG)
    mine.load_state_dict(reference.state_dict())
    assert_parity(mine, x, reference=reference, device="cpu")
    with torch.no_grad():
        mine.W_in[0, 0] *= 1.01
    with pytest.raises(AssertionError, match="is not the function of"):
        assert_parity(mine, x, reference=reference, device="cpu")


def test_an_opaque_module_on_a_wrong_device(x: Tensor):
    with (
        inject("gelu-tanh-ignored"),
        pytest.raises(AssertionError, match="TheirMLP on cpu in float32 is WRONG: output"),
    ):
        assert_parity(TheirMLP(MLP(CFG), "tanh"), 100 * x, device="cpu")


def scaled(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, *inputs, **options: 1.5 * call(self, *inputs, **options)


@pytest.mark.parametrize("within", ["", "blocks.1"])
def test_an_optimized_model_is_judged_as_it_runs(within: str, monkeypatch: pytest.MonkeyPatch):
    model = random_model(dtype=torch.float32)
    model.optimize()
    tokens = random_tokens()
    with torch.no_grad():
        inputs = tokens if not within else model.embed(tokens)
    module = model.get_submodule(within)
    assert_parity(module, inputs, device="cpu")
    monkeypatch.setattr(FastBlock, "__call__", scaled(FastBlock.__call__))
    where = "output" if within else "blocks.0"
    message = rf"on cpu in float32 is WRONG: {where} \(black box"
    with pytest.raises(AssertionError, match=message):
        assert_parity(module, inputs, device="cpu")


@pytest.mark.slow
def test_the_fixture_takes_its_device_from_the_option(pytester: pytest.Pytester):
    pytester.makepyfile(
        """
        import torch
        from clean_transformer import Config, MLP

        def test_mine(assert_parity):
            cfg = Config(n_layers=1, n_heads=1, d_model=8, d_head=8, d_mlp=16)
            assert_parity(MLP(cfg), torch.randn(1, 3, 8))
        """
    )
    plugin = ("-p", "no:cacheprovider", "-rs")
    pytester.runpytest_subprocess(*plugin, "--parity-device=cpu").assert_outcomes(passed=1)
    absent = pytester.runpytest_subprocess(*plugin, "--parity-device=xpu:7")
    absent.assert_outcomes(skipped=1)
    absent.stdout.fnmatch_lines(["*NOT CHECKED: this machine has no xpu:7*"])


def test_the_plugin_does_not_import_torch():
    """Every pytest run in the environment loads it. The package's own `__init__` is left out."""
    code = (
        "import sys, types; package = types.ModuleType('clean_transformer'); "
        f"package.__path__ = {[*clean_transformer.__path__]!r}; "
        "sys.modules['clean_transformer'] = package; "
        "import clean_transformer.parity.pytest_plugin; "
        "assert 'torch' not in sys.modules; from clean_transformer.parity import assert_parity"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
