"""The suite finds every planted fault, and names the activation or the operation that has it."""

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from fnmatch import fnmatch

import pytest
import torch
from _pytest.mark import ParameterSet

from benchmarks.planted_faults import MEETS
from clean_transformer.config import Config
from clean_transformer.hooks import HookedModule, HookPoint
from clean_transformer.parity import invariants
from clean_transformer.parity.faults import DEVICE_FAULTS, SEMANTIC_FAULTS, inject
from clean_transformer.parity.faults.corruptions import SINGLE
from clean_transformer.parity.faults.device import DeviceFault
from clean_transformer.parity.measurements import probe_operations
from clean_transformer.parity.operations import probes
from clean_transformer.parity.operations.known_issues import KNOWN_ISSUES
from clean_transformer.parity.references.base import Reference
from clean_transformer.parity.references.choose import REFERENCES, choose_reference
from clean_transformer.parity.results import DeviceRun
from clean_transformer.parity.same_function import ParityReport, compare
from clean_transformer.parity.suite import check_device
from clean_transformer.parity.uses.every import judge_sampling
from clean_transformer.parity.uses.judge import Judge
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.uses.table import uses
from clean_transformer.parity.uses.training import judge_training
from clean_transformer.parity.verdict import SAME_FUNCTION, Verdict

from ...helpers import quietly, random_model, random_tokens
from ..small import (
    F32,
    IN_A_SHORT_TEXT,
    PROBE_ONLY,
    small_model,
    small_weights,
    weight_changed,
)


class Beside:
    """A model, tokens and a reference that has them already."""

    def __init__(self, reference: str):
        cfg = Config(n_layers=3, n_heads=3, d_model=12, d_head=4, d_mlp=20, d_vocab=30, n_ctx=16)
        self.model = random_model(cfg)
        self.tokens = random_tokens(cfg, length=9)
        theirs = quietly(REFERENCES[reference], cfg, self.model.state_dict())
        activations = theirs.run(self.tokens)
        self.reference = Reference(theirs.title, lambda tokens: activations, theirs.aliases)
        self.names = self._names()
        self.healthy = self.compare()

    def compare(self) -> ParityReport:
        return compare(self.model, self.reference, self.tokens)

    def _names(self) -> list[str]:
        """Every activation of ours, in the order of the forward pass."""
        parts = self.model.named_modules()
        watched = [name for name, part in parts if isinstance(part, HookPoint | HookedModule)]
        with torch.no_grad():
            return [*self.model.run_with_cache(self.tokens, names_filter=filter(None, watched))[1]]


@pytest.fixture(scope="module")
def beside(installed: str) -> Beside:
    return Beside(installed)


def test_without_a_fault_the_function_is_the_same(beside: Beside) -> None:
    assert not [row for row in beside.healthy.rows if row.verdict is not Verdict.PASS]


@pytest.mark.skipif(
    choose_reference("auto")[0] != "bridge",
    reason="the rows name what TransformerBridge caches, which has no optional activations",
)
@pytest.mark.parametrize("fault", SEMANTIC_FAULTS, ids=lambda fault: fault.name)
def test_semantic_fault(fault, beside: Beside, planted: Callable[[str], None]) -> None:
    """WRONG, first in the row's activation: of those from there on, the first the reference has."""
    names = beside.names
    last = f"blocks.{beside.model.cfg.n_layers - 1}"
    start = next(
        place
        for place, name in enumerate(names)
        if fnmatch(name, fault.first.replace("blocks.*", last))
    )
    compared = {row.name for row in beside.healthy.rows}
    expected = next(name for name in names[start:] if name in compared)

    planted("semantic")
    with inject(fault.name):
        report = beside.compare()
    assert report.verdict is Verdict.WRONG
    planted("semantic caught")
    assert report.first_failure is not None
    assert report.first_failure.name == expected
    planted("semantic attributed")


def test_the_smallest_change_of_one_weight_that_is_seen(beside: Beside) -> None:
    """Below it a fault cannot be seen in principle: rounding may be as large."""
    with torch.no_grad():
        _, cache = beside.model.run_with_cache(
            beside.tokens, names_filter=["blocks.0.ln2", "blocks.0.mlp.hook_pre"]
        )
    read, pre = cache["blocks.0.ln2"][..., 0], cache["blocks.0.mlp.hook_pre"]
    moved = (read * beside.model.blocks[0].mlp.W_in[0, 0].detach()).abs()
    allowed = SAME_FUNCTION * (pre[..., 0].abs() + pre.square().mean().sqrt())
    threshold = float((allowed / moved).min())

    def seen(exponent: int) -> bool:
        with weight_changed(2.0**exponent):
            return beside.compare().verdict is Verdict.WRONG

    invisible, visible = -53, 0
    assert seen(visible)
    assert not seen(invisible)
    while visible - invisible > 1:
        middle = (invisible + visible) // 2
        visible, invisible = (middle, invisible) if seen(middle) else (visible, middle)
    # A later activation may be moved more, relative to its scale, than the first.
    assert threshold / 16 < 2.0**visible < 2.1 * threshold


KNOWN = {fault.name for fault in KNOWN_ISSUES}
# One fault of each kind of operation is planted in the fast tests: a product, a fused and an
# explicit attention, an activation function. Planting all takes minutes.
FAST = {
    "linear-noncontiguous-weight",
    "gelu-noncontiguous-input",
    "cache-rows-in-order",
    "argmax-wide",
    "gelu-gradient",
}


def planted_faults(faults: Iterable[DeviceFault]) -> list[ParameterSet]:
    """The faults as parameters of a test; all but those in FAST are slow."""
    return [
        pytest.param(fault, id=fault.name, marks=[] if fault.name in FAST else [pytest.mark.slow])
        for fault in faults
    ]


IN_THE_MODEL = [fault for fault in IN_A_SHORT_TEXT if not fault.first_call_only]
# The uses whose parts the device computes one by one.
USES = ("long text", "generate", "unequal batch", "beams")
# These faults leave the forward pass of a short text right, but together hardly any use works.
ELEVEN = (
    "unembedding-1-row",
    "unembedding-past-100-rows",
    "matmul-3-to-7-rows",
    "matmul-10-to-30-rows",
    "matmul-67-to-1000-rows",
    "sdpa-1-query-many-keys",
    "sdpa-40-to-1000-queries",
    "sdpa-batch-past-2",
    "sdpa-padding-mask",
    "embedding-row-0",
    "add-positions-past-64",
    "argmax-wide",
    "sort-wide",
    "topk-wide",
    "softmax-wide",
    "gelu-gradient",
)


def check(fault: str) -> DeviceRun:
    changes = {"d_vocab": 300} | MEETS.get(fault, {})
    dtype = changes.pop("dtype", F32)
    return check_device(small_weights(**changes), "cpu", dtype)


def assert_attributed(fault, located, planted: Callable[[str], None]) -> None:
    """The report names the operation and, if there is one, the known issue."""
    assert located is not None
    assert located.operation.split(".")[1] in fault.operations
    if fault.name in KNOWN:
        assert fault.name in [match.split(":")[0] for match in located.known]
    planted("device attributed")


def assert_located(fault, located, planted: Callable[[str], None]) -> None:
    """The fault is attributed, and a script shows the fault and only the fault."""
    assert_attributed(fault, located, planted)
    assert len(located.script.splitlines()) < 40
    assert set(re.findall(r"^(?:import|from) (\S+)", located.script, re.M)) == {"torch"}
    script = compile(located.script, fault.name, "exec")
    exec(script, {})
    with inject(fault.name), pytest.raises(AssertionError):
        exec(script, {})


@pytest.mark.usefixtures("model_alone")
@pytest.mark.parametrize("fault", planted_faults(IN_THE_MODEL))
def test_device_fault(fault, planted: Callable[[str], None]) -> None:
    planted("device")
    with inject(fault.name):
        run = check(fault.name)
    assert run.verdict in (Verdict.WRONG, Verdict.DEGRADED)
    planted("device caught")
    assert run.first_failure is not None
    assert_located(fault, run.located, planted)


@pytest.mark.parametrize(
    "fault", planted_faults(fault for fault in DEVICE_FAULTS if fault.name in PROBE_ONLY)
)
def test_device_fault_that_single_operations_find(
    fault, planted: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [probe for probe in probes.PROBES if not re.search(r" (?!8x1024)\d+x\d+", probe.name)]
    monkeypatch.setattr(probes, "PROBES", few)
    dtype = MEETS.get(fault.name, {}).get("dtype", F32)
    planted("device")
    with inject(fault.name):
        checks, located = probe_operations("cpu", dtype)
    assert Verdict.WRONG in {row.verdict for row in checks}
    planted("device caught")
    assert_located(fault, located, planted)


@pytest.fixture(scope="module")
def judge() -> Judge:
    weights = small_weights(n_ctx=104)
    exact = ExactParts(weights.cfg, weights.state, F32)
    return Judge(small_model(weights), exact, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "fault", planted_faults(fault for fault in DEVICE_FAULTS if fault.use in USES)
)
def test_device_fault_of_a_use(fault, judge: Judge, planted: Callable[[str], None]) -> None:
    planted("device")
    named = [use for use in uses(judge.model.cfg) if use.name == fault.use]
    with inject(fault.name):
        results = [judge(use, locates=True) for use in named]
    wrong = [result for result in results if result.verdict is Verdict.WRONG]
    assert wrong
    planted("device caught")
    assert_attributed(fault, wrong[0].located, planted)


@pytest.mark.parametrize(
    "fault", planted_faults(fault for fault in DEVICE_FAULTS if fault.use == "sampling")
)
@torch.no_grad()
def test_device_fault_of_sampling(fault, planted: Callable[[str], None]) -> None:
    planted("device")
    weights = small_weights()
    logits = torch.randn(4, weights.cfg.d_vocab)
    with inject(fault.name):
        result = judge_sampling(weights.cfg, logits)
    assert result.verdict is Verdict.WRONG
    planted("device caught")
    assert_attributed(fault, result.located, planted)


@pytest.mark.parametrize(
    "fault", planted_faults(fault for fault in DEVICE_FAULTS if fault.use == "training")
)
def test_device_fault_of_training(fault, judge: Judge, planted: Callable[[str], None]) -> None:
    planted("device")
    with inject(fault.name):
        result = judge_training(judge, locates=True)
    assert result.verdict is Verdict.WRONG
    planted("device caught")
    assert_attributed(fault, result.located, planted)


@pytest.mark.slow
def test_all_of_them_at_once_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "PROBES", ())
    monkeypatch.setattr(invariants, "INVARIANTS", ())
    with ExitStack() as faults:
        for name in ELEVEN:
            faults.enter_context(inject(name))
        run = check_device(small_weights(n_ctx=104), "cpu", F32)
    assert run.verdict is Verdict.WRONG
    wrong = {use.name for use in run.by_use if use.verdict is Verdict.WRONG}
    assert {*USES, "sampling", "training"} <= wrong


@pytest.mark.slow
@pytest.mark.usefixtures("model_alone")
def test_device_fault_of_the_first_call_alone(planted: Callable[[str], None]) -> None:
    """Caught where it first strikes; by the time an operation is looked for, it is over."""
    planted("device")
    with inject("first-call-imprecise"):
        run = check("first-call-imprecise")
    assert run.verdict in (Verdict.WRONG, Verdict.DEGRADED)
    planted("device caught")
    assert run.located is None


def test_no_fault_is_left_out() -> None:
    """The tests above share the table of device faults among them."""
    rest = [fault.name for fault in DEVICE_FAULTS if fault.first_call_only]
    assert rest == ["first-call-imprecise"]
    known = {"forward", "hooks", "sampling", "training", SINGLE, *USES}
    assert {fault.use for fault in DEVICE_FAULTS} == known
    assert MEETS.keys() <= {fault.name for fault in DEVICE_FAULTS}
