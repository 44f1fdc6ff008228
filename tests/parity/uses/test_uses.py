"""Each use of the model is judged for itself, in the shapes that it alone has."""

from dataclasses import replace

import pytest
import torch

from clean_transformer.kv_cache import StaticKVCache
from clean_transformer.parity.faults import DEVICE_FAULTS
from clean_transformer.parity.faults.corruptions import DeviceFault
from clean_transformer.parity.operations.call import Call
from clean_transformer.parity.uses.every import judge_sampling, judge_uses
from clean_transformer.parity.uses.judge import Judge, UseResult
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.uses.sampling import check_sampling
from clean_transformer.parity.uses.table import steps, uses
from clean_transformer.parity.verdict import Verdict

from ...helpers import needs_torch
from ..small import BF16, F16, F32, F64, small_model, small_weights

WEIGHTS = small_weights(n_ctx=80)
SDPA = frozenset(
    {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"}
)


def judge_of(dtype: torch.dtype) -> Judge:
    exact = ExactParts(WEIGHTS.cfg, WEIGHTS.state, dtype)
    return Judge(small_model(WEIGHTS, dtype), exact, torch.Generator())


def judged(name: str, dtype: torch.dtype = F32) -> UseResult:
    """What the use of that name gives; of two, the first."""
    judge = judge_of(dtype)
    if name == "sampling":
        logits = torch.randn(4, WEIGHTS.cfg.d_vocab, generator=torch.Generator().manual_seed(0))
        return judge_sampling(WEIGHTS.cfg, logits)
    use = next(use for use in uses(WEIGHTS.cfg) if f"{use.name} {use.batch}".startswith(name))
    return judge(use, locates=True)


SLOW = [
    *((each, False) for each in (F64, BF16, F16)),
    *((each, True) for each in (F64, F32, BF16, F16)),
]


@pytest.mark.parametrize(
    ("dtype", "optimized"),
    [
        (F32, False),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW),
    ],
)
def test_healthy_uses_pass(dtype: torch.dtype, optimized: bool):
    judge = judge_of(dtype)
    if optimized:
        judge.model.optimize()
    results = judge_uses(judge)
    assert [result.use.name for result in results] == [
        *("forward", "long text", "generate", "generate", "unequal batch", "beams"),
        *("training", "sampling"),
    ]
    for result in results:
        assert result.verdict is Verdict.PASS, result.first_failure


def scaled(func, args, options):
    output = func(*args, **options)
    first, *rest = output if isinstance(output, tuple) else (output,)
    return (first * 1.01, *rest) if rest else first * 1.01


def next_index(func, args, options):
    return (func(*args, **options) + 1) % WIDE


def other_order(func, args, options):
    values, indices = func(*args, **options)
    return values.roll(1, -1), indices


def n_rows(call: Call) -> int:
    return call.operands[-2].shape[-2]


def is_unembedding(call: Call) -> bool:
    return call.operands[-1].shape[-1] == WEIGHTS.cfg.d_vocab


PRODUCTS = frozenset({"mm", "addmm"})
WIDE = 1000
# A condition on the call, what goes wrong, a use that it breaks, and one that it does not reach.
# These are the faults of a device that once passed with all of them, in the sizes of this model.
FAULTS = {
    "unembedding of one row": (
        *(PRODUCTS, lambda c: is_unembedding(c) and n_rows(c) == 1, scaled),
        *("generate 1", "long text"),
    ),
    "unembedding of more than 70 rows": (
        *(PRODUCTS, lambda c: is_unembedding(c) and n_rows(c) > 70, scaled),
        *("long text", "forward"),
    ),
    "products of 3 to 7 rows": (
        *(PRODUCTS, lambda c: 3 <= n_rows(c) <= 7, scaled),
        *("generate 4", "forward"),
    ),
    "products of 67 to 1000 rows": (
        *(PRODUCTS, lambda c: 67 <= n_rows(c) <= 1000, scaled),
        *("long text", "generate 1"),
    ),
    "one query over many keys": (
        *(SDPA, lambda c: c.operands[0].shape[-2] == 1 and c.operands[1].shape[-2] > 33, scaled),
        *("generate 1", "beams"),
    ),
    "40 to 1000 queries": (
        *(SDPA, lambda c: 40 <= c.operands[0].shape[-2] <= 1000, scaled),
        *("long text", "forward"),
    ),
    "batches above 2": (
        *(SDPA, lambda c: c.operands[0].shape[0] > 2, scaled),
        *("unequal batch", "generate 1"),
    ),
    "masks [batch 1 query key]": (
        *(SDPA, lambda c: len(c.operands) > 3 and c.operands[3].shape[0] == 3, scaled),
        *("unequal batch", "generate 1"),
    ),
    "argmax over the vocabulary": (
        *(frozenset({"argmax"}), lambda c: c.operands[0].shape[-1] > WIDE, next_index),
        *("sampling", "forward"),
    ),
    "sort over the vocabulary": (
        *(frozenset({"sort"}), lambda c: c.operands[0].shape[-1] > WIDE, other_order),
        *("sampling", "forward"),
    ),
    "topk over the vocabulary": (
        *(frozenset({"topk"}), lambda c: c.operands[0].shape[-1] > WIDE, other_order),
        *("sampling", "forward"),
    ),
    "softmax over the vocabulary": (
        *(frozenset({"_softmax"}), lambda c: c.operands[0].shape[-1] > WIDE, scaled),
        *("sampling", "forward"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_one_use_is_found_there_and_located(name: str):
    operations, condition, corrupt, broken, healthy = FAULTS[name]
    with DeviceFault("", "", operations, condition, corrupt).plant():
        result, other = judged(broken), judged(healthy)
    assert result.verdict is Verdict.WRONG
    assert result.located is not None
    assert result.located.operation.split(".")[1] in operations
    assert other.verdict is Verdict.PASS, other.first_failure


def test_a_cache_slot_written_one_early_is_found_in_half_precision():
    def one_early(func, args, options):
        target, source, *rest = args
        earlier = target.as_strided(
            target.shape, target.stride(), target.storage_offset() - target.stride(1)
        )
        # The slot would keep uninitialized memory, which differs from run to run.
        func(target, torch.zeros_like(source), *rest, **options)
        func(earlier, source, *rest, **options)
        return target

    def is_slot(call: Call) -> bool:
        target = call.operands[0]
        return len(target.shape) == 4 and target.shape[1] == 1 and target.storage_offset > 0

    with DeviceFault("", "", frozenset({"copy_"}), is_slot, one_early).plant():
        for name in ("generate", "unequal batch"):
            assert judged(name, BF16).verdict is Verdict.WRONG, name
        # Here, the error is 5 times what is healthy, and WRONG begins at 10 times.
        assert judged("beams", BF16).verdict is Verdict.DEGRADED
        assert judged("forward", BF16).verdict is Verdict.PASS


@pytest.mark.parametrize("start", [8, 64])
def test_the_first_wrong_position_is_told(start: int):
    def late(func, args, options):
        weight, indices = args
        return func(weight, indices.clamp(max=start - 1), **options)

    def is_position(call: Call) -> bool:
        return call.operands[0].shape[0] == WEIGHTS.cfg.n_ctx

    with DeviceFault("", "", frozenset({"embedding"}), is_position, late).plant():
        generate = judged("generate")
    assert generate.verdict is Verdict.WRONG
    assert generate.wrong_from == start


def test_the_position_of_wrong_logits_is_that_of_the_token():
    def is_late(call: Call) -> bool:
        return is_unembedding(call) and n_rows(call) == 1

    with DeviceFault("", "", PRODUCTS, is_late, scaled).plant():
        generate = judged("generate")
    # The first call reads one token, so its only logits are those of position 0.
    assert generate.wrong_from == 0
    assert generate.use.reads[:4] == (1, 1, 18, 1)


@pytest.mark.parametrize("n_ctx", [1, 2, 3, 8, 33, 1024])
def test_every_length_of_context_has_its_uses(n_ctx: int):
    for use in uses(small_weights(n_ctx=n_ctx).cfg):
        assert 1 <= use.length <= n_ctx
        calls = use.calls(WEIGHTS.cfg)
        assert [call.shape[1] for call in calls] == [*use.reads]
        ids = {int(token) for call in calls for token in call.flatten()}
        assert 0 in ids or use.length * use.batch < 3


@pytest.mark.parametrize(
    ("length", "positions", "reads"),
    [(1024, (1, 64), (1, 1, 62, 1)), (9, (1, 64), (1, 1)), (1, (1,), (1,)), (3, (2, 2, 9), (2, 1))],
)
def test_one_token_is_read_after_each_of_the_positions(length, positions, reads):
    assert steps(length, positions) == reads


@torch.no_grad()
def test_random_rounding_runs_again_only_for_other_inputs(monkeypatch: pytest.MonkeyPatch):
    runs: list[int] = []
    estimate = Judge._envelope
    monkeypatch.setattr(Judge, "_envelope", lambda *given: (runs.append(1), estimate(*given))[1])
    judge, use = judge_of(F32), uses(small_weights().cfg)[0]
    blocks = len(judge.model.blocks)
    assert judge(use, locates=False).verdict is Verdict.PASS
    assert len(runs) == blocks
    judge.model.embed.W_E.mul_(1.001)
    judge(use, locates=False)
    assert len(runs) == blocks
    judge.model.embed.W_E.mul_(1.1)
    judge(use, locates=False)
    assert len(runs) > blocks


@needs_torch("2.6", "compiled decoding cannot be checked")
def test_a_static_cache_is_judged_like_another():
    judge = replace(judge_of(F32), cache_class=StaticKVCache)
    for use in uses(WEIGHTS.cfg):
        if use.is_cached:
            result = judge(use, locates=True)
            assert result.verdict is Verdict.PASS, result.first_failure


def test_sampling_runs_every_operation_that_chooses_tokens():
    logits = torch.randn(4, WEIGHTS.cfg.d_vocab, generator=torch.Generator().manual_seed(0))
    reports = check_sampling(WEIGHTS.cfg, logits)
    seen = {name for _, report in reports for name in report.compared}
    wanted = "argmax topk sort cumsum _softmax _log_softmax multinomial scatter index"
    assert {*wanted.split()} <= seen


SAMPLING_FAULTS = [fault for fault in DEVICE_FAULTS if fault.use == "sampling"]


@pytest.mark.parametrize("fault", SAMPLING_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_of_sampling_is_found_and_located(fault: DeviceFault):
    with fault.plant():
        result = judged("sampling")
    assert result.verdict is Verdict.WRONG
    assert result.located is not None
    assert result.located.operation.split(".")[1] in fault.operations
