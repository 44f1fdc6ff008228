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
from clean_transformer.modules.block import TransformerBlock
from clean_transformer.modules.mlp import MLP
from clean_transformer.parity import assert_parity, check_operations, inject, oracle

from ..helpers import needs_torch, random_model, random_tokens

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


class OffInFloat32(variants.FlexAttention):
    """Its values are too large by 0.1%, but not in float64."""

    def mix(self, *args: Tensor, **options: Tensor) -> Tensor:
        z = super().mix(*args, **options)
        return z if z.dtype == torch.float64 else z * 1.001


@needs_torch("2.5", "there is no FlexAttention")
@torch.no_grad()
def test_flex_attention_runs_in_the_oracle(x: Tensor):
    right, flex = Attention(CFG).double(), variants.FlexAttention(CFG).double()
    flex.load_state_dict(right.state_dict())
    with oracle.trusted():
        torch.testing.assert_close(flex(x.double()), right(x.double()), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_is_judged_or_reads_not_checked(x: Tensor, monkeypatch: pytest.MonkeyPatch):
    right = Attention(CFG)
    for kind in (variants.FlexAttention, OffInFloat32):
        module = kind(CFG)
        module.load_state_dict(right.state_dict())
        if kind is variants.FlexAttention:
            assert_parity(module, x, reference=right, device="cpu")
            with torch.no_grad():
                assert check_operations(module, x).not_checked == {"flex_attention": 1}
        else:
            with pytest.raises(AssertionError, match="WRONG: output"):
                assert_parity(module, x, reference=right, device="cpu")
    monkeypatch.setattr(oracle, "UNCOMPILED", "absent")  # as in an older PyTorch
    with pytest.raises(NotImplementedError, match=r"^NOT CHECKED: PyTorch .* flex_attention"):
        assert_parity(module, x, device="cpu")


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


class Returns(nn.Module):
    """Returns what a function makes of the input."""

    def __init__(self, function: Callable[[Tensor], object]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        (lambda x: (2 * x, 9 * x), lambda x: 2 * x, "2 output tensors instead of 1"),
        (lambda x: (x, x.argmax(-1)), lambda x: (x, x.argmin(-1)), "the outputs differ"),
        (lambda x: x.argmax(-1), lambda x: x.argmin(-1), "the outputs differ"),
        (lambda x: {}, lambda x: {}, "NOT CHECKED: it returns no tensor"),
    ],
)
def test_every_output_is_compared_with_the_reference(mine, theirs, message: str, x: Tensor):
    with pytest.raises(AssertionError, match=message):
        assert_parity(Returns(mine), x, reference=Returns(theirs), device="cpu")


def test_outputs_without_floating_point_numbers(x: Tensor):
    ids = Returns(lambda x: x.argmax(-1))
    assert_parity(ids, x, reference=ids, device="cpu")
    assert_parity(nn.Linear(32, 2), x[:0], reference=nn.Linear(32, 2), device="cpu")
    with pytest.raises(AssertionError, match="NOT CHECKED: it has no output of floating-point"):
        assert_parity(Returns(lambda x: torch.rand(3).argsort()), x, device="cpu")
    with pytest.raises(ValueError, match="an output is complex"):
        assert_parity(Returns(torch.fft.fft), x, device="cpu")


def test_a_module_without_inputs_is_compared():
    class Square(nn.Module):
        def forward(self) -> Tensor:
            y = torch.ones(3, 3) / 3
            return y if y.dtype == torch.float64 else 1.01 * y

    with pytest.raises(AssertionError, match="Square on cpu in float32 is WRONG: output"):
        assert_parity(Square(), device="cpu")


def test_a_module_that_draws_random_numbers_is_refused(x: Tensor):
    drops = Returns(lambda x: nn.functional.dropout(x, 0.5, training=True))
    with pytest.raises(ValueError, match="have different outputs"):
        assert_parity(drops, x, device="cpu")
    right = nn.Sequential(nn.Linear(32, 4), nn.Dropout(0.5)).eval()
    live = nn.Sequential(nn.Linear(32, 4), nn.Dropout(0.5))
    with pytest.raises(AssertionError, match="has active dropout: 1"):
        assert_parity(right, x, reference=live, device="cpu")


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


class Plain(nn.Linear):
    """A module that is 10% off, but in float32 only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.1 if x.dtype == torch.float32 else 1)


class Lowering(nn.Linear):
    """A module that multiplies in bfloat16, whatever its own dtype is."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.bfloat16() @ self.weight.bfloat16().T).to(x.dtype) + self.bias


class Several(nn.Linear):
    """A module with a second output, which may be wrong in float32."""

    factor = 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x * (self.factor if x.dtype == torch.float32 else 1)


class SeveralOff(Several):
    factor = 1.1


@pytest.mark.parametrize("referred", [False, True])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Plain, "Plain on cpu in float32 is WRONG: output"),
        (Lowering, "is WRONG: output (.|\\n)*; the module itself converts numbers to bfloat16"),
        (SeveralOff, "SeveralOff on cpu in float32 is WRONG: output 1"),
    ],
)
def test_a_module_that_is_wrong_by_itself_is_wrong(
    kind: type, message: str, referred: bool, x: Tensor
):
    module = kind(32, 8)
    with pytest.raises(AssertionError, match=message):
        assert_parity(module, x, reference=module if referred else None, device="cpu")


def test_every_output_and_empty_inputs_are_accepted(x: Tensor):
    assert_parity(Several(32, 8), x, device="cpu")
    for module in (Several(32, 8), MLP(CFG), TransformerBlock(CFG)):
        assert_parity(module, x[:0], device="cpu")


class WithoutRows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, : 9 if x.dtype == torch.float64 else 8]


def test_an_output_of_another_shape_is_named_without_numbers_too(x: Tensor):
    with pytest.raises(AssertionError, match=r"shapes \[\[0, 8, 8\]\], not \[\[0, 9, 8\]\]"):
        assert_parity(WithoutRows(32, 8), x[:0], device="cpu")


@pytest.mark.parametrize("n_ctx", [1, 2])
def test_models_of_few_positions(n_ctx: int):
    cfg = Config(n_layers=1, n_heads=2, d_model=8, d_head=4, d_mlp=8, d_vocab=20, n_ctx=n_ctx)
    assert_parity(
        random_model(cfg, dtype=torch.float32), random_tokens(cfg, length=n_ctx), device="cpu"
    )


def test_active_dropout_is_named(x: Tensor):
    module = nn.Sequential(nn.Linear(32, 8), nn.Dropout(0.1))
    with pytest.raises(AssertionError, match=r"active dropout: 1 \(p = 0.1\).*call .eval\(\)"):
        assert_parity(module, x, device="cpu")
    assert_parity(module.eval(), x, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind",
    [
        variants.AlibiAttention,
        variants.RotaryAttention,
        variants.SlidingWindowAttention,
        variants.GroupedQueryAttention,
        variants.LinearAttention,
        variants.SdpaAttention,
        variants.ParallelBlock,
        variants.ExactGeluMLP,
    ],
)
def test_every_variant_passes(kind: type, dtype: torch.dtype, x: Tensor):
    assert_parity(kind(CFG), x, device="cpu", dtype=dtype)


def test_an_operation_is_named_in_a_module_of_anybody(x: Tensor):
    with (
        inject("gelu-tanh-ignored"),
        pytest.raises(AssertionError, match=r"aten\.gelu\.default"),
    ):
        assert_parity(TheirMLP(MLP(CFG), "tanh"), 100 * x, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mlp_of_transformers(dtype: torch.dtype, x: Tensor):
    gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    config = gpt2.GPT2Config(n_embd=32, n_head=2, n_layer=1)
    with torch.random.fork_rng():
        mlp, changed = (gpt2.GPT2LMHeadModel(config).eval().transformer.h[0].mlp for _ in "ab")
    changed.load_state_dict(mlp.state_dict())
    assert_parity(mlp, x, reference=changed, device="cpu", dtype=dtype)
    for change in (lambda: changed.c_fc.weight[0, 0].mul_(1.01), lambda: changed.c_fc.bias.add_(1)):
        with torch.no_grad():
            change()
        with pytest.raises(AssertionError, match="is not the function of"):
            assert_parity(mlp, x, reference=changed, device="cpu", dtype=dtype)
        changed.load_state_dict(mlp.state_dict())


COMPILED = """
import copy
import torch
from torch import nn
from clean_transformer import Config, DemoTransformer, MLP
from clean_transformer.parity import assert_parity

def times(factor):
    def backend(graph, inputs):
        return lambda *args: tuple(factor * output for output in graph.forward(*args))
    return backend

def in_float32(graph, inputs):
    single = copy.deepcopy(graph)
    def run(*args):
        double = any(arg.dtype == torch.float64 for arg in args)
        outputs = single.forward(*(arg.float() if double else arg for arg in args))
        return tuple(output.double() if double else output for output in outputs)
    return run

cfg = Config(n_layers=2, n_heads=2, d_model=32, d_head=16, d_mlp=64, d_vocab=50, n_ctx=16)
x, tokens = torch.randn(2, 9, 32), torch.arange(18).view(2, 9)

def compiled(kind, how, backend):
    torch._dynamo.reset()
    module = kind(cfg)
    if how == "wrapped":
        return torch.compile(module, backend=backend)
    if how == "in place":
        module.compile(backend=backend)
    if how == "inside":
        module.blocks[1].compile(backend=backend)
    if how == "forward":
        module.forward = torch.compile(module.forward, backend=backend)
    return module

def verdict(module, given, **options):
    try:
        assert_parity(module, given, device="cpu", **options)
    except AssertionError as error:
        return str(error).split(": ")[0].split(" is ")[-1]
    except ValueError as error:
        return str(error).split(",")[0]
    return "PASS"

rows = [(MLP, how, x) for how in ("wrapped", "in place", "forward")]
rows += [(DemoTransformer, how, tokens) for how in ("in place", "inside")]
for kind, how, given in rows:
    print(how, *(verdict(compiled(kind, how, b), given) for b in ("eager", times(1.1))))
for backend in (times(1.1), in_float32):
    module = compiled(MLP, "wrapped", backend)
    print("beside itself", verdict(module, x, reference=module._orig_mod))
print(verdict(compiled(MLP, "in place", "eager"), x, dtype=torch.bfloat16))
"""


@pytest.mark.slow
def test_compiled_modules_are_judged_as_they_are_compiled():
    """In a process of its own: the checks of types that tests have cannot be compiled."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "wrapped PASS WRONG",
        "in place PASS WRONG",
        "forward PASS WRONG",
        "in place PASS WRONG",
        "inside PASS WRONG",
        "beside itself WRONG",
        "beside itself PASS",
        "a MLP is compiled",
    ], done.stderr


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
    unknown = pytester.runpytest_subprocess(*plugin, "--parity-device=cuuda")
    unknown.assert_outcomes(errors=1)
    unknown.stdout.fnmatch_lines(["*unknown device 'cuuda'*"])


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
