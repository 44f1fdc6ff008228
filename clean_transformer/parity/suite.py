"""The parity suite: answers the three questions for the chosen devices, dtypes and modes.

The docstring of `clean_transformer.parity` lists the three questions.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.parity.activations.black_box import compiled_leaves
from clean_transformer.parity.inputs import Weights, suite_tokens
from clean_transformer.parity.invariants import check_invariants
from clean_transformer.parity.measurements import (
    Subject,
    end_to_end,
    isolated_errors,
    probe_operations,
    record_run,
)
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.references.base import ReferenceUnavailable
from clean_transformer.parity.references.choose import REFERENCES
from clean_transformer.parity.results import DeviceRun, SuiteReport
from clean_transformer.parity.same_function import ParityReport, compare
from clean_transformer.parity.uses.every import judge_uses
from clean_transformer.parity.uses.judge import Judge
from clean_transformer.parity.uses.oracle import check_oracle
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.reports.environment import device_settings, environment
from clean_transformer.support.devices import is_available
from clean_transformer.support.dtypes import choose_dtype


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
    `not_checked` of the result is the reason.
    """
    started = DeviceRun(device, str(dtype).removeprefix("torch."), mode)
    reason = _cannot_check(device, dtype, mode)
    if reason:
        return replace(started, not_checked=reason)

    on_step("first call")
    cfg, tokens = weights.cfg, suite_tokens(weights.cfg)
    with torch.device("meta"):
        model = DemoTransformer(cfg)
    # In float32 on the CPU, the model shares its weights with `weights`, to save memory.
    model.load_state_dict({n: w.to(device, dtype) for n, w in weights.state.items()}, assign=True)
    if mode.startswith("optimized"):
        model.optimize()
    compiled = compiled_leaves(model) if mode.endswith("compiled") else nullcontext()
    autocast = torch.bfloat16 if mode == "autocast" else None
    exact, generator = ExactParts(cfg, weights.state, dtype), torch.Generator()
    generator.seed()
    under_test = Subject(model, exact, tokens, autocast)
    with under_test.context(), compiled:
        record = record_run(under_test)

        on_step("end to end")
        rows, felt, allowed = end_to_end(under_test, record, reference)
        isolated, located = isolated_errors(under_test, record, on_step)
        uses = judge_uses(
            Judge(model, exact, generator, autocast),
            locates=mode == "eager",
            # `torch.compile` would compile the modules again for each length of the cache.
            with_cache="compiled" not in mode,
            on_step=on_step,
        )
        on_step("invariants")
        invariants = check_oracle(exact, generator)
        invariants += check_invariants(model, under_test.given, allowed, record.logits)
    on_step("single operations")
    probes, faulty_probe = probe_operations(device, dtype) if mode == "eager" else ([], None)
    return replace(
        started,
        settings=device_settings(torch.device(device)),
        uses=uses,
        isolated=isolated,
        end_to_end=rows,
        invariants=invariants,
        probes=probes,
        impact=felt,
        located=located or next((use.located for use in uses if use.located), faulty_probe),
    )


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
