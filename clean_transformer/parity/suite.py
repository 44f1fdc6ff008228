"""The parity suite: runs all checks for the chosen devices, dtypes and modes.

The checks say whether the model is the same function as GPT-2, whether the device computes it
accurately, and which operation goes wrong first.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache, StaticKVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.activations.black_box import compiled_leaves
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.attempts import Attempts, failed_check
from clean_transformer.parity.graphs import counted_graphs
from clean_transformer.parity.inputs import LENGTH, Weights, suite_tokens
from clean_transformer.parity.invariants import check_invariants
from clean_transformer.parity.lowered import in_lower_precision
from clean_transformer.parity.measurements import (
    Subject,
    end_to_end,
    isolated_errors,
    probe_operations,
    record_run,
)
from clean_transformer.parity.modes import INDUCTOR, Compilation, require_mode
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.references.base import Reference, ReferenceUnavailable
from clean_transformer.parity.references.choose import READERS, REFERENCES
from clean_transformer.parity.results import DeviceRun, SuiteReport
from clean_transformer.parity.same_function import ParityReport, compare, is_in_long
from clean_transformer.parity.uses.compiled_step import judge_compiled_step
from clean_transformer.parity.uses.every import judge_uses
from clean_transformer.parity.uses.judge import Judge
from clean_transformer.parity.uses.oracle import check_oracle
from clean_transformer.parity.uses.overflow import overflow
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.uses.table import uses
from clean_transformer.parity.verdict import Check, Verdict
from clean_transformer.reports.environment import device_settings, environment
from clean_transformer.support.devices import is_available, known_device
from clean_transformer.support.dtypes import choose_dtype
from clean_transformer.support.memory import give_back_memory
from clean_transformer.weights.table import State


def same_function(weights: Weights, reference: str) -> ParityReport:
    """Compare our model with another implementation of GPT-2, in float64 on the CPU.

    `reference` is the name of this implementation. If possible, the implementation's own code reads
    the weights from their files. Then the comparison also finds a fault of our loader. All
    activations are compared on short texts. On a text of n_ctx tokens, only the activations in
    `LONG` are compared.
    """
    with trusted():
        state = {name: value.double() for name, value in weights.state.items()}
        model = DemoTransformer.from_state_dict(state, weights.cfg)
        theirs, read_by = _reference(weights, reference, state)
        report = compare(model, theirs, suite_tokens(weights.cfg))
        rows = report.rows
        if weights.cfg.n_ctx > LENGTH:
            long = suite_tokens(weights.cfg, 1, weights.cfg.n_ctx)
            rows = rows + compare(model, theirs, long, keep=is_in_long).rows
        return replace(report, rows=rows, weights=read_by)


def _reference(weights: Weights, name: str, state: State) -> tuple[Reference, str]:
    """Return the named reference, and a sentence that says which code read its weights."""
    read, why = READERS[name], "they are not in a folder that it can read"
    if weights.folder is not None and read is not None:
        try:
            reference = read(weights.folder)
            return reference, f"{reference.title} has read the weights from {weights.folder} itself"
        except ReferenceUnavailable as error:
            why = str(error)
    reference = REFERENCES[name](weights.cfg, state)
    return reference, f"{reference.title} has got its weights from our loader, because {why}"


@torch.no_grad()
def check_device(
    weights: Weights,
    device: str,
    dtype: torch.dtype,
    *,
    mode: str = "eager",
    compilation: Compilation = INDUCTOR,
    reference: str | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> DeviceRun:
    """Check how accurately a device runs the model, and find the first wrong operation.

    In the mode "compiled", `compilation` chooses the compile backend. If this backend makes no
    graph, the result says that the mode is NOT CHECKED. If `reference` names another implementation
    of GPT-2, `end_to_end` of the result also holds the error of this implementation on the CPU.
    Before each step, `on_step` gets the name of the step.

    Nothing runs if this machine does not have the device, if the device does not support the dtype
    or the mode, or if the dtype cannot represent the largest weights or activations. Then
    `not_checked` of the result is the reason. If a measurement raises an exception, the other
    measurements still run, and the result describes the exception (see `failed_check`). Raises
    `ValueError` for an unknown device or mode.
    """
    known_device(device)
    require_mode(mode)
    started = DeviceRun(device, str(dtype).removeprefix("torch."), mode)
    attempts = Attempts()
    reason = _cannot_check(device, dtype, mode)
    if not reason:
        find = partial(overflow, weights, dtype)
        reason = attempts.run(f"the largest numbers in {started.dtype}", find, "")
    if reason:
        return replace(started, not_checked=reason)

    def begin(step: str) -> None:
        give_back_memory()
        on_step(step)

    with ExitStack() as entered:
        graphs = entered.enter_context(counted_graphs()) if mode.endswith("compiled") else None
        begin("first call")
        start = partial(_start, weights, device, dtype, mode, compilation, entered)
        under_test = attempts.run("the model on the device", start, None)
        if under_test is None:
            return replace(started, errors=attempts.failed)
        model, exact = under_test.model, under_test.exact
        generator = torch.Generator()
        generator.seed()
        record = attempts.run("first call", partial(record_run, under_test), None)
        isolated: list[Isolated] = []
        rows, felt, allowed, located = [], None, None, None
        if record is not None:
            begin("end to end")
            drift = partial(end_to_end, under_test, record, reference)
            rows, felt, allowed = attempts.run("end to end", drift, ([], None, None))
            isolated, located = isolated_errors(under_test, record, attempts, begin)
        cache_class = StaticKVCache if mode.endswith("compiled") else KVCache
        judge = Judge(model, exact, generator, under_test.autocast, cache_class)
        judged = judge_uses(judge, on_step=begin)
        if mode == "optimized-compiled":
            judged.append(judge_compiled_step(model, exact))
        begin("oracle beside NumPy")
        beside = partial(check_oracle, exact, generator)
        invariants = attempts.run("oracle beside NumPy", beside, [])
        begin("invariants")
        if record is None or allowed is None:
            note = "the allowed difference comes from the drift, which could not be measured"
            invariants.append(Check("invariants", Verdict.NOT_CHECKED, note=note))
        else:
            given = (model, under_test.given, allowed, record.logits)
            invariants += attempts.run("invariants", partial(check_invariants, *given), [])
    begin("single operations")
    probes: list[Check] = []
    faulty_probe = None
    if mode == "eager":
        probe = partial(probe_operations, device, dtype)
        probes, faulty_probe = attempts.run("single operations", probe, ([], None))
    settings = attempts.run("settings", partial(device_settings, torch.device(device)), {})
    if graphs is not None:
        settings |= {"compile backend": compilation.backend, **graphs.in_words()}
        attempts.failed += graphs.checks()
    run = replace(
        started,
        settings=settings,
        uses=judged,
        isolated=isolated,
        end_to_end=rows,
        invariants=invariants,
        probes=probes,
        errors=attempts.failed,
        impact=felt,
        located=located or next((use.located for use in judged if use.located), faulty_probe),
    )
    return in_lower_precision(run)


def number_of_steps(cfg: Config) -> int:
    """Return how many times `check_device` calls `on_step` for a model of this configuration."""
    # Each block, the last LayerNorm and each use are a step. The seven other steps are the first
    # call, end to end, training, sampling, the oracle, invariants and single operations.
    return cfg.n_layers + 1 + len(uses(cfg)) + 7


def _start(
    weights: Weights,
    device: str,
    dtype: torch.dtype,
    mode: str,
    compilation: Compilation,
    entered: ExitStack,
) -> Subject:
    """Build the model under test on its device, and the same model in float64 on the CPU.

    Autocast and compilation, if the mode asks for them, stay on until `entered` is closed.
    """
    with torch.device("meta"):
        model = DemoTransformer(weights.cfg)
    # In float32 on the CPU, the model shares its weights with `weights`, to save memory.
    model.load_state_dict({n: w.to(device, dtype) for n, w in weights.state.items()}, assign=True)
    autocast = torch.bfloat16 if mode == "autocast" else None
    exact = ExactParts(weights.cfg, weights.state, dtype)
    under_test = Subject(model, exact, suite_tokens(weights.cfg), autocast)
    if mode.startswith("optimized"):
        model.optimize()
    entered.enter_context(under_test.context())
    if mode.endswith("compiled"):
        entered.enter_context(compiled_leaves(model, compilation))
    return under_test


def run_suite(
    weights: Weights,
    devices: Iterable[str],
    dtypes: Iterable[str],
    modes: Iterable[str] = ("eager",),
    *,
    compilation: Compilation = INDUCTOR,
    reference: str | None,
    no_reference: str = "",
    on_step: Callable[[str], None] = lambda step: None,
) -> SuiteReport:
    """Compare the model with a reference, and check every device, dtype and mode.

    `compilation` chooses the compile backend for the mode "compiled". `reference` is the name of
    another implementation of GPT-2, or None. Without a reference, the verdict on the comparison is
    NOT CHECKED, and the report gives `no_reference` as the reason. If the reference is not
    available, the verdict is also NOT CHECKED, and the report says why. If the comparison raises an
    exception, the devices are still checked. Before each step, `on_step` gets the name of the step.
    Raises `ValueError`, before any work, for an unknown device, dtype or mode.
    """
    cells = [*product(devices, dtypes, modes)]
    for device, dtype, mode in cells:
        known_device(device)
        choose_dtype(dtype)
        require_mode(mode)
    same, without_reference = None, Verdict.NOT_CHECKED
    if reference is not None:
        on_step(f"float64 beside {reference}")
        try:
            same = same_function(weights, reference)
        except ReferenceUnavailable as error:
            no_reference, reference = str(error), None
        except Exception as error:
            failed = failed_check(f"float64 beside {reference}", error)
            no_reference, reference, without_reference = failed.note, None, failed.verdict
    runs = [
        check_device(
            weights,
            device,
            choose_dtype(dtype),
            mode=mode,
            compilation=compilation,
            reference=reference,
            on_step=lambda step, where=f"{device} {dtype} {mode}": on_step(f"{where}: {step}"),
        )
        for device, dtype, mode in cells
    ]
    report = report_on(weights, same, no_reference, runs)
    return replace(report, without_reference=without_reference)


def report_on(
    weights: Weights, same: ParityReport | None, no_reference: str, runs: list[DeviceRun]
) -> SuiteReport:
    """Return a `SuiteReport` with the comparison `same` and the results `runs`.

    If the model was not compared with a reference, `same` is None, and `no_reference` is the
    reason.
    """
    tokens = suite_tokens(weights.cfg)
    return SuiteReport(
        weights=weights.title,
        cfg=weights.cfg,
        tokens=(tokens.shape[0], tokens.shape[1]),
        environment=environment(),
        same_function=same,
        no_reference=no_reference,
        runs=runs,
    )


def _cannot_check(device: str, dtype: torch.dtype, mode: str) -> str:
    if not is_available(device):
        return f"this machine has no {device}"
    if dtype is torch.float64 and torch.device(device).type == "mps":
        return f"{device} has no float64"
    if mode == "autocast" and dtype is not torch.float32:
        return "autocast lowers the precision of float32 only"
    return ""
