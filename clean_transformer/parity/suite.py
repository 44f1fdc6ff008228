"""The parity suite: answers the three questions for the chosen devices, dtypes and modes.

The docstring of `clean_transformer.parity` lists the three questions.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.parity.activations.black_box import compiled_leaves
from clean_transformer.parity.attempts import Attempts
from clean_transformer.parity.inputs import Weights, suite_tokens
from clean_transformer.parity.invariants import check_invariants
from clean_transformer.parity.measurements import (
    Subject,
    end_to_end,
    isolated_errors,
    probe_operations,
)
from clean_transformer.parity.oracle import float64_oracle, trusted
from clean_transformer.parity.references.base import ReferenceUnavailable
from clean_transformer.parity.references.choose import REFERENCES
from clean_transformer.parity.results import DeviceRun, SuiteReport
from clean_transformer.parity.same_function import ParityReport, compare
from clean_transformer.parity.uses.every import judge_uses
from clean_transformer.parity.uses.judge import Judge
from clean_transformer.parity.uses.oracle import check_oracle
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.verdict import Check, Verdict
from clean_transformer.reports.environment import device_settings, environment
from clean_transformer.support.devices import is_available
from clean_transformer.support.dtypes import choose_dtype

# Why the invariants are NOT CHECKED if the measurement of drift raises an exception.
NO_ALLOWANCE = "the allowed difference comes from the drift, which could not be measured"


def same_function(
    weights: Weights, reference: str, tokens: Int[Tensor, "batch pos"]
) -> ParityReport:
    """Question 1: compare our model with the named reference, in float64 on the CPU."""
    with trusted():
        state = {name: value.double() for name, value in weights.state.items()}
        model = DemoTransformer.from_state_dict(state, weights.cfg)
        return compare(model, REFERENCES[reference](weights.cfg, state), tokens)


@torch.no_grad()
def check_device(
    weights: Weights,
    device: str,
    dtype: torch.dtype,
    *,
    mode: str = "eager",
    reference: str | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> DeviceRun:
    """Answer questions 2 and 3 for one device, dtype and mode.

    If `reference` names a reference, the rows of drift (`end_to_end`) also hold the reference's own
    error on the CPU. Before each step, `on_step` gets the step's name. If this machine does not
    have the device, or if the device does not support the dtype or mode, nothing runs, and
    `not_checked` of the result is the reason. If a measurement raises an exception, the other
    measurements still run, and the result describes the exception (see `failed_check`).
    """
    started = DeviceRun(device, str(dtype).removeprefix("torch."), mode)
    reason = _cannot_check(device, dtype, mode)
    if reason:
        return replace(started, not_checked=reason)

    attempts = Attempts()
    with ExitStack() as entered:
        on_step("first call")
        start = partial(_start, weights, device, dtype, mode, entered)
        under_test = attempts.run("the model on the device", start, None)
        if under_test is None:
            return replace(started, errors=attempts.failed)
        model, exact = under_test.model, ExactParts(weights.cfg, weights.state, dtype)
        generator = torch.Generator()
        generator.seed()
        first = attempts.run("first call", lambda: model(under_test.given), None)

        on_step("end to end")
        drift = partial(end_to_end, under_test, reference)
        rows, felt, allowed = attempts.run("end to end", drift, ([], None, None))
        isolated, located = isolated_errors(under_test, attempts, on_step)
        uses = judge_uses(
            Judge(model, exact, generator, under_test.autocast),
            locates=mode == "eager",
            # `torch.compile` would compile the modules again for each length of the cache.
            with_cache="compiled" not in mode,
            on_step=on_step,
        )
        on_step("invariants")
        invariants = [Check("invariants", Verdict.NOT_CHECKED, note=NO_ALLOWANCE)]
        if allowed is not None:
            invariants = check_invariants(model, under_test.given, allowed, first)
        beside = partial(check_oracle, exact, generator)
        invariants += attempts.run("oracle beside NumPy", lambda: [beside()], [])
    on_step("single operations")
    probes: list[Check] = []
    faulty_probe = None
    if mode == "eager":
        probe = partial(probe_operations, device, dtype)
        probes, faulty_probe = attempts.run("single operations", probe, ([], None))
    return replace(
        started,
        settings=attempts.run("settings", partial(device_settings, torch.device(device)), {}),
        uses=uses,
        isolated=isolated,
        end_to_end=rows,
        invariants=invariants,
        probes=probes,
        errors=attempts.failed,
        impact=felt,
        located=located or next((use.located for use in uses if use.located), faulty_probe),
    )


def _start(
    weights: Weights, device: str, dtype: torch.dtype, mode: str, entered: ExitStack
) -> Subject:
    """Build the model under test on its device, with the models that it is compared with.

    The contexts in which the model runs stay entered until `entered` is closed.
    """
    on_cpu = DemoTransformer.from_state_dict(
        {name: value.to(dtype) for name, value in weights.state.items()}, weights.cfg
    )
    model = DemoTransformer.from_state_dict(on_cpu.state_dict(), weights.cfg).to(device)
    autocast = torch.bfloat16 if mode == "autocast" else None
    oracle, tokens = float64_oracle(on_cpu), suite_tokens(weights.cfg)
    under_test = Subject(model, on_cpu, oracle, tokens, autocast)
    if mode.startswith("optimized"):
        model.optimize()
    entered.enter_context(under_test.context())
    if mode.endswith("compiled"):
        entered.enter_context(compiled_leaves(model))
    return under_test


def run_suite(
    weights: Weights,
    devices: Iterable[str],
    dtypes: Iterable[str],
    modes: Iterable[str] = ("eager",),
    *,
    reference: str | None,
    no_reference: str = "",
    on_step: Callable[[str], None] = lambda step: None,
) -> SuiteReport:
    """Answer question 1 once, then questions 2 and 3 for every device, dtype and mode.

    `reference` is the name of a reference, or None. Without a reference, question 1 is NOT CHECKED,
    and the report gives `no_reference` as the reason. If the reference is not available, question 1
    is also NOT CHECKED, and the report says why. Before each step, `on_step` gets the step's name.
    """
    tokens = suite_tokens(weights.cfg)
    same = None
    if reference is not None:
        on_step(f"float64 beside {reference}")
        try:
            same = same_function(weights, reference, tokens)
        except ReferenceUnavailable as error:
            no_reference, reference = str(error), None
    runs = [
        check_device(
            weights,
            device,
            choose_dtype(dtype),
            mode=mode,
            reference=reference,
            on_step=lambda step, where=f"{device} {dtype} {mode}": on_step(f"{where}: {step}"),
        )
        for device in devices
        for dtype in dtypes
        for mode in modes
    ]
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
