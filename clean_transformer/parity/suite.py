"""The whole parity suite: every question, on every device and in every dtype asked for."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.analysis.comparison import LOGITS, Impact, impact, rms_errors, run
from clean_transformer.hooks import HookedModule
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.activations.black_box import (
    HEALTHY_RHO,
    compiled_leaves,
    is_whole,
    isolate_whole,
    leaves,
    rounding,
)
from clean_transformer.parity.activations.drift import EndToEnd, healthy_envelope
from clean_transformer.parity.activations.isolated import PATHS, Isolated, isolate
from clean_transformer.parity.inputs import Weights, suite_tokens
from clean_transformer.parity.invariants import check_invariants, row_difference
from clean_transformer.parity.locate import Located, in_words, locate
from clean_transformer.parity.operations.probes import run_probes
from clean_transformer.parity.oracle import float64_oracle, trusted
from clean_transformer.parity.references.base import ReferenceUnavailable
from clean_transformer.parity.references.choose import REFERENCES
from clean_transformer.parity.results import DeviceRun, SuiteReport, first_bad_activation
from clean_transformer.parity.same_function import ParityReport, compare
from clean_transformer.parity.verdict import Check
from clean_transformer.reports.environment import device_settings, environment
from clean_transformer.support.devices import is_available
from clean_transformer.support.dtypes import DTYPES

# Lengths at which kernels have changed their minds, besides those of the main run.
CLIFFS = (1, 2, 8, 9, 31, 32, 1023, 1024)


def same_function(
    weights: Weights, reference: str, tokens: Int[Tensor, "batch pos"]
) -> ParityReport:
    """Question 1: our model beside the reference, both in float64 on the CPU."""
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
    """Questions 2 and 3 on one device in one dtype."""
    started = DeviceRun(device, str(dtype).removeprefix("torch."), mode)
    reason = _cannot_check(device, dtype, mode)
    if reason:
        return replace(started, not_checked=reason)

    on_step("first call")
    cfg, tokens = weights.cfg, suite_tokens(weights.cfg, 2, min(33, weights.cfg.n_ctx))
    on_cpu = DemoTransformer.from_state_dict(
        {name: value.to(dtype) for name, value in weights.state.items()}, cfg
    )
    model = DemoTransformer.from_state_dict(on_cpu.state_dict(), cfg).to(device)
    oracle = float64_oracle(on_cpu)
    if mode.startswith("optimized"):
        model.optimize()
    compiled = compiled_leaves(model) if mode.endswith("compiled") else nullcontext()
    autocast = torch.bfloat16 if mode == "autocast" else None
    under_test = Subject(model, on_cpu, oracle, tokens, autocast)
    with under_test.context(), compiled:
        first = model(under_test.given)

        on_step("end to end")
        rows, felt, allowed = _end_to_end(under_test, reference)
        isolated, located = _isolated(under_test, on_step)
        on_step("invariants")
        invariants = check_invariants(model, under_test.given, allowed, first)
    on_step("single operations")
    probes, faulty_probe = _probe(device, dtype) if mode == "eager" else ([], None)
    return replace(
        started,
        settings=device_settings(torch.device(device)),
        isolated=isolated,
        end_to_end=rows,
        invariants=invariants,
        probes=probes,
        impact=felt,
        located=located or faulty_probe,
    )


@dataclass(frozen=True)
class Subject:
    """A model on the device under test, with its copies on the CPU, in the same dtype and exact."""

    model: DemoTransformer
    on_cpu: DemoTransformer
    oracle: DemoTransformer
    tokens: Int[Tensor, "batch pos"]
    autocast: torch.dtype | None

    @property
    def given(self) -> Int[Tensor, "batch pos"]:
        """The tokens on the device."""
        return self.tokens.to(self.model.embed.W_E.device)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that its results claim."""
        return self.autocast or self.on_cpu.embed.W_E.dtype

    @property
    def has_wholes(self) -> bool:
        """Whether some of its modules can be watched from outside only."""
        return any(is_whole(part) for part in self.model.modules())

    def context(self) -> AbstractContextManager[object]:
        """What the model runs in."""
        kind = self.given.device.type
        return torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None)


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
    """Question 1 once, then each device in each dtype and mode.

    Without a reference the first question is NOT CHECKED, and `no_reference` says why.
    """
    tokens = suite_tokens(weights.cfg, 2, min(33, weights.cfg.n_ctx))
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
            DTYPES[dtype],
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


def cliff_inputs(model: DemoTransformer) -> tuple[int, dict[str, Tensor]]:
    """A block to try, with inputs of the lengths and layouts that have met faults, by name.

    The block is the fourth, or the last: GPT-2's residual stream is at its worst from there on.
    """
    layer, n_ctx = min(3, model.cfg.n_layers - 1), model.cfg.n_ctx
    tokens = suite_tokens(model.cfg, 2, n_ctx).to(model.embed.W_E.device)
    residual = model.embed(tokens) + model.pos_embed(tokens)
    for block in list(model.blocks)[:layer]:
        residual = block(residual)
    lengths = sorted({min(length, n_ctx) for length in CLIFFS})
    cases = {f"1 × {length} tokens": residual[:1, :length].clone() for length in lengths}
    both = residual[:, : min(33, n_ctx)]
    cases["permuted input"] = both.transpose(0, 1).contiguous().transpose(0, 1)
    cases["transposed input"] = both.mT.contiguous().mT
    cases["sliced input"] = residual[:, -both.shape[1] :]
    return layer, cases


def _isolated(
    subject: Subject, on_step: Callable[[str], None]
) -> tuple[list[Isolated], Located | None]:
    model, oracle, given = subject.model, subject.oracle, subject.given
    case = f"{given.shape[0]} × {given.shape[1]} tokens"
    if subject.has_wholes:
        on_step("isolated, as a whole")
        return isolate_whole(model, subject.on_cpu, oracle, given, case=case), None

    layer, cliffs = cliff_inputs(model)
    name = f"blocks.{layer}"
    block, exact_block = (
        cast(HookedModule, model.blocks[layer]),
        cast(HookedModule, oracle.blocks[layer]),
    )
    runs: list[tuple[str, HookedModule, HookedModule, str, str, Tensor]] = [
        ("", model, oracle, case, path, given) for path in PATHS
    ]
    runs += [
        (name, block, exact_block, cliff, path, x)
        for cliff, x in cliffs.items()
        for path in ("fused", "explicit")
    ]
    isolated: list[Isolated] = []
    for prefix, module, exact, case, path, x in runs:
        on_step(f"isolated, {case}, {path}")
        rows = isolate(module, exact, x, path=path, case=case, autocast=subject.autocast)
        isolated += [replace(row, name=f"{prefix}.{row.name}".strip(".")) for row in rows]
    bad = first_bad_activation(isolated)
    if bad is None:
        return isolated, None
    prefix, module, x = next(
        (prefix, module, x)
        for prefix, module, _, case, path, x in runs
        if (case, path) == (bad.case, bad.path)
    )
    located = locate(module, bad.name.removeprefix(prefix).lstrip("."), bad.path, x)
    return isolated, located and replace(located, where=bad.name or LOGITS)


def _probe(device: str, dtype: torch.dtype) -> tuple[list[Check], Located | None]:
    results = run_probes(device, dtype)
    checks = [
        Check(
            f"{result.name}, {result.layout}",
            result.verdict,
            result.ratio,
            note=result.finding.diagnosis if result.finding else "",
        )
        for result in results
    ]
    faulty = next((result for result in results if result.finding), None)
    if faulty is None or faulty.finding is None:
        return checks, None
    return checks, in_words(faulty.finding, f"{faulty.name}, {faulty.layout}")


def _cannot_check(device: str, dtype: torch.dtype, mode: str) -> str:
    if not is_available(device):
        return f"this machine has no {device}"
    if dtype is torch.float64 and torch.device(device).type == "mps":
        return f"{device} has no float64"
    if mode == "autocast" and dtype is not torch.float32:
        return "autocast lowers the precision of float32 only"
    return ""


def _end_to_end(subject: Subject, reference: str | None) -> tuple[list[EndToEnd], Impact, float]:
    tokens, on_cpu, healthy = subject.tokens, subject.on_cpu, HEALTHY_RHO[subject.dtype]
    names = [*leaves(subject.model)] if subject.has_wholes else None
    device = run(subject.model, subject.given, names)
    with trusted():
        exact = run(subject.oracle, tokens, names)
        with subject.context():
            envelope = healthy_envelope(on_cpu, tokens, exact)
            off = row_difference(on_cpu(tokens), exact[LOGITS])
            allowed = 2 * healthy * max(off, rounding(subject.dtype))
        theirs = _reference_errors(on_cpu, tokens, reference, exact) if reference else {}
        rows = [
            EndToEnd(name, error, envelope[name], healthy, theirs.get(name))
            for name, error in rms_errors(device, exact).items()
        ]
        return rows, impact(device[LOGITS], exact[LOGITS], tokens), allowed


def _reference_errors(
    model: DemoTransformer,
    tokens: Int[Tensor, "batch pos"],
    name: str,
    exact: dict[str, Tensor],
) -> dict[str, float]:
    theirs = REFERENCES[name](model.cfg, model.state_dict())
    activations = theirs.run(tokens)
    ours = {theirs.aliases.get(key, key): value for key, value in activations.items()}
    same_shape = {
        key: value
        for key, value in ours.items()
        if key in exact and value.shape == exact[key].shape
    }
    return rms_errors(same_shape, exact)
