from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clean_transformer.modules.attention import Attention
from clean_transformer.modules.mlp import MLP
from clean_transformer.parity.activations.isolated import isolate
from clean_transformer.parity.limits import LINEAR
from clean_transformer.parity.operations.bounds import expected_outputs
from clean_transformer.parity.operations.check import check_operations
from clean_transformer.parity.operations.judgment import judge
from clean_transformer.parity.operations.replay import Call64, operation_name
from clean_transformer.parity.oracle import float64_oracle, trusted
from clean_transformer.parity.verdict import Verdict

from ...helpers import TINY, needs_torch, randomized

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Some queries of these masks see no key.
WITHOUT_KEYS = needs_torch("2.5", "attention of a query without a key is not 0")
FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.ones(5, 9, dtype=torch.bool).tril(2)},
        pytest.param(
            {"attn_mask": torch.ones(5, 9, dtype=torch.bool).tril(-2)}, marks=WITHOUT_KEYS
        ),
        pytest.param({"attn_mask": torch.ones(5, 9).tril(-2).log().double()}, marks=WITHOUT_KEYS),
        {"attn_mask": sample(5, 9).double()},
        {"scale": 0.3},
    ],
)
def test_exact_attention_is_the_function_that_torch_documents(options: dict) -> None:
    q, k, v = sample(2, 3, 5, 8), sample(2, 3, 9, 8, seed=1), sample(2, 3, 9, 8, seed=2)
    func = torch.ops.aten.scaled_dot_product_attention.default
    (expected,) = expected_outputs(Call64(func, (q, k, v), options, torch.float32)) or [None]
    assert expected is not None
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    torch.testing.assert_close(expected.exact, want, rtol=1e-12, atol=1e-12)


def test_attention_of_another_device_is_compared_and_its_seeds_are_not() -> None:
    q = sample(1, 2, 9, 8)
    expected = expected_outputs(Call64(FLASH, (q, q, q, 0.0, True), {}, torch.float32))
    assert expected is not None
    assert len(expected) == 1


def test_attention_with_dropout_is_not_compared() -> None:
    q = sample(1, 2, 9, 8)
    assert expected_outputs(Call64(FLASH, (q, q, q, 0.1), {}, torch.float32)) == [None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_precision_tells_other_numbers_from_rounding(dtype: torch.dtype) -> None:
    x, w = sample(9, 6400).to(dtype), sample(6400, 64, seed=1).to(dtype)
    func = torch.ops.aten.mm.default
    expected = expected_outputs(Call64(func, (x, w), {}, dtype))
    assert expected is not None
    right = x @ w
    one_wrong = right.clone()
    one_wrong[3, 5] = right[4, 5]
    zeros = right.clone()
    zeros[:, 40:] = 0
    assert judge(expected, right).verdict is Verdict.PASS
    assert judge(expected, one_wrong).verdict is Verdict.WRONG
    assert judge(expected, one_wrong).worst == (3, 5)
    assert judge(expected, zeros).verdict is Verdict.WRONG


def test_a_healthy_average_of_many_values_of_one_sign_is_not_blamed() -> None:
    """Its rounding errors all go one way, and gather like √k or faster."""
    pattern = torch.full((1, 1, 1023), 1 / 1023)
    values = torch.linspace(0.5, 1, 64).expand(1, 1023, 64).contiguous()
    in_order = torch.zeros(1, 1, 64)
    for key in range(1023):
        in_order = in_order + pattern[:, :, key : key + 1] * values[:, key : key + 1]
    call = Call64(torch.ops.aten.bmm.default, (pattern, values), {}, torch.float32)
    expected = expected_outputs(call)
    assert expected is not None
    assert judge(expected, torch.bmm(pattern, values)).verdict is Verdict.PASS
    judgment = judge(expected, in_order)
    assert (judgment.verdict, judgment.precision) == (Verdict.PASS, "")
    assert judgment.ratio > LINEAR.healthy
    in_order[0, 0, 7] *= 1.1
    assert judge(expected, in_order).verdict is Verdict.WRONG
    assert judge(expected, in_order).worst == (0, 0, 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("module", "point", "operation"),
    [
        (MLP, "hook_pre", "addmm"),
        (MLP, "hook_post", "gelu"),
        (Attention, "hook_pattern", "_softmax"),
    ],
)
def test_both_checks_give_an_operation_the_same_ratio(
    module: type, point: str, operation: str, dtype: torch.dtype
) -> None:
    """The activation's and the operation's: one table of limits, one formula for G."""
    part = randomized(module(TINY), dtype)
    x = sample(2, 9, TINY.d_model).to(dtype)
    [row] = [row for row in isolate(part, float64_oracle(part), x) if row.name == point]
    seen: list[tuple[float, float, float]] = []
    with torch.no_grad(), Watching(operation, seen):
        part.run_with_cache(x, names_filter=["hook_pattern"]) if module is Attention else part(x)
    ratio, healthy, wrong = seen[0]
    assert row.ratio == pytest.approx(ratio, rel=1e-6)
    assert (row.healthy, row.wrong) == (healthy, wrong)


class Watching(TorchDispatchMode):
    """Judges every call of one operation."""

    def __init__(self, name: str, seen: list[tuple[float, float, float]]):
        super().__init__()
        self.name, self.seen = name, seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if operation_name(func) == self.name:
            with trusted():
                call = Call64(func, args, kwargs or {}, output.dtype)
                (expected,) = expected_outputs(call) or [None]
                assert expected is not None
                ratio = judge([expected], output).ratio
                self.seen.append((ratio, expected.healthy, expected.wrong))
        return output


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pattern_must_be_zero_where_the_scores_are_masked(dtype: torch.dtype) -> None:
    scores = sample(2, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).to(dtype)
    func = torch.ops.aten._softmax.default
    expected = expected_outputs(Call64(func, (scores, -1, False), {}, dtype))
    assert expected is not None
    pattern = scores.softmax(-1)
    assert judge(expected, pattern).verdict is Verdict.PASS
    pattern[0, 2, 3] = 1e-5
    assert judge(expected, pattern).verdict is Verdict.WRONG
    assert judge(expected, pattern).worst == (0, 2, 3)


def test_indices_of_equal_values_may_come_in_any_order() -> None:
    x = torch.zeros(2, 5)
    func = torch.ops.aten.topk.default
    expected = expected_outputs(Call64(func, (x, 2), {}, torch.float32))
    assert expected is not None
    values = torch.zeros(2, 2)
    assert judge(expected, (values, torch.tensor([[0, 1], [4, 2]]))).verdict is Verdict.PASS
    assert judge(expected, (values, torch.tensor([[0, 1], [4, 5]]))).verdict is Verdict.WRONG


def test_an_overflow_to_infinity_is_right() -> None:
    x = torch.full((4,), 60000.0, dtype=torch.float16)
    assert check_operations(lambda: x + x).verdict is Verdict.PASS


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_losses_and_samplers_are_compared(dtype: torch.dtype) -> None:
    logits = sample(9, 50).to(dtype)

    def run() -> None:
        F.cross_entropy(logits.float(), torch.arange(9))
        kept = logits.masked_fill(logits < logits.topk(5).values[:, -1:], -torch.inf)
        ordered, _ = kept.sort(descending=True)
        ordered.softmax(-1).cumsum(-1)
        torch.multinomial(kept.float().softmax(-1), 1)
        logits.var(-1), logits.std(), logits.argmax(-1), logits.exp(), logits.abs().log()
        logits[:, [1, 3]].sum(), torch.cat([logits, logits]).abs().rsqrt()

    report = check_operations(run)
    assert report.finding is None
    assert not report.not_checked
