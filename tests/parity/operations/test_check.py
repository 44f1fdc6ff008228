from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.attention import Attention
from clean_transformer.modules.layer_norm import LayerNorm
from clean_transformer.modules.mlp import MLP
from clean_transformer.parity.assertion import assert_parity
from clean_transformer.parity.faults import inject
from clean_transformer.parity.faults.corruptions import (
    attending,
    first_columns_repeated,
    rounded,
    with_factors,
    with_result,
)
from clean_transformer.parity.operations.call import Operand, lay_out
from clean_transformer.parity.operations.check import check_operations, first_wrong_operation
from clean_transformer.parity.operations.script import reproduction_script
from clean_transformer.parity.verdict import Verdict

from ..small import broken, no_float64

CFG = Config(n_layers=1, n_heads=4, d_model=64, d_head=16, d_mlp=256, d_vocab=100, n_ctx=64)


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flip(output: Tensor) -> Tensor:
    return output.flip(-1)


def seeded(module: type, cfg: Config = CFG) -> Any:
    torch.manual_seed(0)
    return module(cfg)


# device fault: the mode, what is run, the operation, what the diagnosis says
FAULTS = {
    "mm, non-contiguous second operand": (
        lambda: inject("linear-noncontiguous-weight"),
        lambda: (torch.mm, sample(9, 64), sample(32, 64).T),
        "aten.mm.default",
        "wrong only when argument 2 (mat2) is not contiguous",
    ),
    "addmm, any": (
        lambda: broken("addmm", with_result(flip)),
        lambda: (torch.addmm, sample(32), sample(9, 64), sample(64, 32)),
        "aten.addmm.default",
        "right in its unfused form",
    ),
    "gelu, non-contiguous": (
        lambda: inject("gelu-noncontiguous-input"),
        lambda: (lambda x: torch.nn.functional.gelu(x, approximate="tanh"), sample(64, 9).T),
        "aten.gelu.default",
        "wrong only when argument 1 (self) is not contiguous; right in its unfused form",
    ),
    "layer_norm, storage offset": (
        lambda: inject("layer-norm-storage-offset"),
        lambda: (seeded(LayerNorm), sample(3, 9, 64)[1:]),
        "aten.native_layer_norm.default",
        "wrong only when argument 1 (input) has the storage offset 576; right in its unfused form",
    ),
    "SDPA, future tokens": (
        lambda: broken(
            "_scaled_dot_product_flash_attention_for_cpu",
            attending(lambda query, key, n_keys: key > query + 3),
        ),
        lambda: (seeded(Attention), sample(2, 9, 64)),
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "right in its unfused form",
    ),
    "mm, first 1024 columns": (
        lambda: broken("mm", with_result(first_columns_repeated)),
        lambda: (torch.matmul, sample(2, 9, 16), sample(16, 1030)),
        "aten.mm.default",
        "wrong in every form tried",
    ),
    "addmm, TF32": (
        lambda: broken("addmm", with_factors(rounded(10))),
        lambda: (seeded(MLP), sample(2, 9, 64)),
        "aten.addmm.default",
        "computed in TF32 precision; right in its unfused form",
    ),
    "argmax, INT64_MIN": (
        lambda: inject("argmax-int64-min"),
        lambda: (lambda x: x.argmax(-1), sample(9, 65)),
        "aten.argmax.default",
        "wrong in every form tried",
    ),
    "multinomial, INT64_MIN": (
        lambda: inject("multinomial-int64-min"),
        lambda: (lambda x: torch.multinomial(x, 3, True), sample(9, 65).abs()),
        "aten.multinomial.default",
        "wrong in every form tried",
    ),
    "where, non-contiguous condition": (
        lambda: inject("where-noncontiguous-condition"),
        lambda: (torch.where, (sample(65, 9) > 0).T, sample(9, 65), sample(9, 65, seed=1)),
        "aten.where.self",
        "wrong only when argument 1 (condition) is not contiguous",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_reproduced(fault: str) -> None:
    device, case, operation, diagnosis = FAULTS[fault]
    function, *inputs = case()
    assert first_wrong_operation(function, *inputs) is None

    with device():
        finding = first_wrong_operation(function, *inputs)

    assert finding is not None
    assert finding.call.operation == operation
    assert finding.diagnosis == diagnosis
    script = reproduction_script(finding)
    assert len(script.splitlines()) < 40
    assert [line for line in script.splitlines() if "import" in line.split()] == ["import torch"]
    exec(compile(script, "reproduction", "exec"), {})
    with device(), pytest.raises(AssertionError, match=operation):
        exec(compile(script, "reproduction", "exec"), {})


def test_a_finding_describes_the_call() -> None:
    with inject("linear-noncontiguous-weight"):
        finding = first_wrong_operation(torch.matmul, sample(2, 9, 64), sample(32, 64).T)

    assert finding is not None
    assert [x.shape for x in finding.call.operands] == [(18, 64), (64, 32)]
    assert finding.call.operands[1].stride == (1, 64)
    assert finding.verdict is Verdict.WRONG
    assert finding.ratio > 1e5
    assert finding.diagnosis == "wrong only when argument 2 (mat2) is not contiguous"


def test_effective_precision_tells_tf32_from_corruption() -> None:
    x, w = sample(33, 768), sample(768, 768, seed=1)
    with inject("matmul-tf32"):
        tf32 = first_wrong_operation(torch.mm, x, w)
    with inject("matmul-bf16-inputs"):
        bfloat16 = first_wrong_operation(torch.mm, x, w)
    with broken("mm", with_result(lambda output: output.roll(1, 0))):
        corrupt = first_wrong_operation(torch.mm, x, w)

    assert tf32 is not None
    assert bfloat16 is not None
    assert corrupt is not None
    assert tf32.judgment.precision == "TF32"
    assert bfloat16.judgment.precision == "bfloat16"
    assert (tf32.verdict, bfloat16.verdict, corrupt.verdict) == (
        Verdict.DEGRADED,
        Verdict.DEGRADED,
        Verdict.WRONG,
    )
    assert corrupt.bits < bfloat16.bits < tf32.bits < 24


def test_one_corrupted_element_is_not_a_lower_precision() -> None:
    """Its error is as small as one rounding to bfloat16, which would move every element."""

    def corrupt(output: Tensor) -> Tensor:
        output = output.clone()
        output[3, 5] += 2.0**-8 * output.std()
        return output

    mlp, x = seeded(MLP), sample(2, 9, 64)
    with broken("addmm", with_result(corrupt)):
        report = check_operations(mlp, x)
        with pytest.raises(AssertionError) as failure:
            assert_parity(mlp, x, device="cpu")
    assert report.verdict is Verdict.WRONG
    assert report.finding is not None
    assert "computed in" not in report.finding.diagnosis
    assert "MLP on cpu in float32 is WRONG: hook_pre" in str(failure.value)
    assert "computed in" not in str(failure.value)
    assert "the errors are those of" not in str(failure.value)


def test_a_fault_of_the_first_call_only_is_not_blamed_on_the_layout() -> None:
    calls: list[Tensor] = []

    def first_only(output: Tensor) -> Tensor:
        calls.append(output)
        return output.flip(-1) if len(calls) == 1 else output

    with broken("mm", with_result(first_only)):
        finding = first_wrong_operation(torch.mm, sample(9, 64), sample(32, 64).T)
    assert finding is not None
    assert finding.diagnosis == "wrong the first time, right when the same call is repeated"


def test_a_wrong_operation_is_found_behind_a_degraded_one() -> None:
    def spoil(output: Tensor) -> Tensor:
        return output if output.shape[-1] == 256 else output.flip(-1)

    with broken("addmm", with_result(spoil)), inject("matmul-tf32"):
        finding = first_wrong_operation(seeded(MLP), sample(2, 9, 64))
    assert finding is not None
    assert finding.verdict is Verdict.WRONG
    assert finding.call.operands[2].shape == (256, 64)


def test_a_sum_that_a_few_terms_dominate_may_round_at_every_addition() -> None:
    """Each of the k additions rounds a partial sum that is as large as the result."""

    def in_order(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        terms = args[0].T[:, :, None] * args[1][:, None]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def far_off(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        return func(*args) + 200 * 2.0**-24 * (args[0].abs() @ args[1].abs())

    k = 2**14
    x, w = sample(4, k), sample(k, 8, seed=1)
    dominated = torch.cat([torch.ones(4, 1), x[:, 1:] * 1e-5], 1)
    w[0] = 1
    off = in_order(None, (dominated, w), {}).double() - dominated.double() @ w.double()
    assert (off.abs() / (dominated.abs() @ w.abs())).max() > 30 * 2.0**-24
    with broken("mm", in_order):
        assert check_operations(torch.mm, dominated, w).verdict is Verdict.PASS
        assert check_operations(torch.mm, x, w).verdict is Verdict.PASS
    with broken("mm", far_off):
        assert check_operations(torch.mm, x, w).verdict is Verdict.DEGRADED


def test_a_number_that_is_none_is_wrong() -> None:
    with broken("add", with_result(lambda output: output * torch.nan)):
        finding = first_wrong_operation(torch.add, sample(4), sample(4))
    assert finding is not None
    assert finding.ratio == float("inf")


def test_what_cannot_be_compared_is_counted() -> None:
    report = check_operations(lambda x: torch.bernoulli(x.sigmoid()) + x, sample(9))
    assert report.not_checked == {"bernoulli": 1}
    assert report.compared == {"sigmoid": 1, "add": 1}
    assert report.verdict is Verdict.NOT_CHECKED


def test_in_place_out_and_unknown_operations_are_compared() -> None:
    pair = sample(9, 9)

    def function(x: Tensor) -> None:
        x = x.clone()
        x[1:].add_(x[:-1].clone()).mul_(3)
        torch.mm(x, x.T, out=torch.empty(9, 9))
        torch.special.expm1(x)
        x.sort(dim=-1)
        x.copy_(torch.zeros(9, dtype=torch.bfloat16))[0].fill_(2)
        torch.std_mean(pair)

    report = check_operations(function, sample(9, 9))
    assert report.finding is None
    assert not report.not_checked
    assert {"add", "mul", "mm", "expm1", "sort", "copy", "fill"} <= set(report.compared)
    with broken("add_", with_result(lambda output: output.mul_(1.001))):
        finding = first_wrong_operation(function, sample(9, 9))
    assert finding is not None
    assert finding.call.operation == "aten.add_.Tensor"


@given(
    seed=st.integers(0, 2**16),
    pos=st.sampled_from([1, 2, 9, 33]),
    d_head=st.sampled_from([8, 64]),
    gain=st.sampled_from([1.0, 20.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    explicit=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_a_healthy_model_has_no_finding_and_nothing_unchecked(
    seed: int, pos: int, d_head: int, gain: float, dtype: torch.dtype, explicit: bool
) -> None:
    # There, fused attention computes the scores in float16, and the check finds this.
    assume(torch.__version__ >= "2.5" or dtype != torch.float16 or explicit)
    torch.manual_seed(seed)
    cfg = Config(
        n_layers=1, n_heads=2, d_model=2 * d_head, d_head=d_head, d_mlp=96, d_vocab=100, n_ctx=64
    )
    model = DemoTransformer(cfg).requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(weight * gain if weight.ndim > 1 else torch.randn_like(weight))
    model.to(dtype)
    tokens = torch.randint(100, (2, pos))

    def run() -> None:
        if explicit:
            model.run_with_cache(tokens, names_filter=[*model.hook_dict])
        else:
            model(tokens)

    with no_float64():
        report = check_operations(run)
    assert report.finding is None
    assert not report.not_checked
    assert report.verdict is Verdict.PASS


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.T, lambda x: x[1:, 2:5]])
def test_lay_out_keeps_values_stride_and_offset(view: Any) -> None:
    x = view(sample(6, 7))
    again = lay_out(x.contiguous(), Operand.of(x), "cpu")
    assert torch.equal(again, x)
    assert Operand.of(again) == Operand.of(x)
    expanded = sample(1, 7).expand(6, 7)
    assert torch.equal(lay_out(expanded.contiguous(), Operand.of(expanded), "cpu"), expanded)


@pytest.mark.parametrize("name", ["argmax", "native_layer_norm", "mul"])
def test_a_device_may_read_subnormal_numbers_as_0(name: str):
    """Like xla. It reads normal numbers as they are: numbers of 1e-37 as 0 are a fault."""
    functions = {
        "argmax": torch.argmax,
        "native_layer_norm": lambda x: torch.nn.functional.layer_norm(x, (64,)),
        "mul": lambda x: x * 1e30,
    }

    def flush_below(limit: float):
        def corrupt(func, args, options):
            x, *others = args
            return func(x.masked_fill(x.abs() < limit, 0.0), *others, **options)

        return broken(name, corrupt)

    subnormal, normal = sample(9, 64) * 1e-39, sample(9, 64) * 1e-37
    with flush_below(1e-38):
        assert check_operations(functions[name], subnormal).verdict is Verdict.PASS
    with flush_below(1e-36):
        assert check_operations(functions[name], normal).verdict is Verdict.WRONG


def test_nan_beside_subnormal_numbers_is_not_read_as_0():
    x = torch.tensor([1e-39, torch.nan])
    with broken("mul", with_result(lambda y: y.nan_to_num())):
        assert check_operations(torch.mul, x, 2.0).verdict is Verdict.WRONG
