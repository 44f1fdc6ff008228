"""The whole parity suite: every question, on every device and in every dtype asked for."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.activations import HookedModule
from clean_transformer.config import Config
from clean_transformer.device import available, is_available, resolve_device
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.compare import ParityReport, compare
from clean_transformer.parity.end_to_end import (
    LOGITS,
    EndToEnd,
    Impact,
    healthy_envelope,
    impact,
    rms_errors,
    run,
)
from clean_transformer.parity.environment import device_settings, environment
from clean_transformer.parity.invariants import Check, check_invariants, row_difference
from clean_transformer.parity.isolate import PATHS, Isolated, float64_oracle, isolate
from clean_transformer.parity.references import REFERENCES, ReferenceUnavailable
from clean_transformer.parity.trust import trusted
from clean_transformer.parity.verdict import Verdict, worst
from clean_transformer.weights.hub import HubError
from clean_transformer.weights.load import read_pretrained
from clean_transformer.weights.synthetic import plain, stress
from clean_transformer.weights.table import State

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Lengths at which kernels have changed their minds, besides those of the main run.
CLIFFS = (1, 2, 8, 9, 31, 32, 1023, 1024)
# A device's own rounding may differ from the CPU's this many times over.
HEALTHY_RHO = {torch.float64: 2.0, torch.float32: 2.0, torch.bfloat16: 3.0, torch.float16: 3.0}


@dataclass(frozen=True)
class Weights:
    """The parameters that a run uses, under our names in float32, and where they are from."""

    title: str
    cfg: Config
    state: State


@dataclass(frozen=True)
class DeviceRun:
    """Questions 2 and 3 for one device and dtype; `not_checked` says why there is nothing."""

    device: str
    dtype: str
    settings: dict[str, str] = field(default_factory=dict)
    isolated: list[Isolated] = field(default_factory=list)
    end_to_end: list[EndToEnd] = field(default_factory=list)
    invariants: list[Check] = field(default_factory=list)
    impact: Impact | None = None
    not_checked: str = ""

    @property
    def verdict(self) -> Verdict:
        """The worst of every row and check."""
        rows: list[Isolated | EndToEnd | Check] = [
            *self.isolated,
            *self.end_to_end,
            *self.invariants,
        ]
        return worst(row.verdict for row in rows)

    @property
    def first_failure(self) -> Isolated | None:
        """The first activation, in the order of the forward pass, that does not pass."""
        order = {row.name: index for index, row in reversed([*enumerate(self.isolated)])}
        failures = [row for row in self.isolated if row.verdict is not Verdict.PASS]
        return min(failures, key=lambda row: order[row.name], default=None)


@dataclass(frozen=True)
class SuiteReport:
    """What `clean-transformer parity` found."""

    weights: str
    cfg: Config
    tokens: tuple[int, int]
    environment: dict[str, str]
    same_function: ParityReport | None
    no_reference: str
    runs: list[DeviceRun]

    @property
    def verdict(self) -> Verdict:
        """PASS only if the function is the same and every device computes it accurately."""
        same = self.same_function.verdict if self.same_function else Verdict.NOT_CHECKED
        return worst([same, *(run.verdict for run in self.runs)])


def choose_devices(names: str) -> list[str]:
    """The devices named, between commas; "auto" is the fastest here, "all" cuda, mps and cpu.

    Raises `ValueError` for one that PyTorch does not know; one that is absent is NOT CHECKED.
    """
    if names == "all":
        return ["cpu", "cuda", "mps"]
    chosen = [str(resolve_device()) if name == "auto" else name for name in names.split(",")]
    for name in chosen:
        try:
            torch.device(name)
        except RuntimeError:
            raise ValueError(
                f"PyTorch knows no device {name!r}; this machine has {available()}"
            ) from None
    return chosen


def choose_dtypes(names: str) -> list[str]:
    """The dtypes named, between commas, or all. Raises `ValueError` for an unknown one."""
    chosen = [*DTYPES] if names == "all" else names.split(",")
    for name in chosen:
        if name not in DTYPES:
            raise ValueError(f"no dtype {name!r}; choose from {', '.join(DTYPES)}, all")
    return chosen


def choose_weights(source: str | None) -> Weights:
    """The weights of a hub id, alias or folder; or of "stress" or "plain", also "stress:medium".

    Without a source, GPT-2 small from the hub or its cache, else `stress` weights of its shape.
    """
    kind, _, size = (source or "").partition(":")
    if kind in ("stress", "plain"):
        cfg = Config.gpt2(size or "small")
        title = f"synthetic {kind!r} weights of GPT-2 {size or 'small'}'s shape"
        return Weights(title, cfg, (stress if kind == "stress" else plain)(cfg))
    try:
        cfg, state = read_pretrained(source or "gpt2", torch.device("cpu"), torch.float32)
        return Weights(f"the weights of {source or 'gpt2'}", cfg, state)
    except HubError as error:
        if source:
            raise
        synthetic = choose_weights("stress")
        return replace(synthetic, title=f"{synthetic.title}, because {error}")


def suite_tokens(cfg: Config, batch: int, length: int) -> Int[Tensor, "batch pos"]:
    """Ids spread over the vocabulary, the first of each row its last (<|endoftext|> in GPT-2)."""
    tokens = (torch.arange(batch * length) * 7919 % cfg.d_vocab).reshape(batch, length)
    tokens[:, 0] = cfg.d_vocab - 1
    return tokens


def same_function(
    weights: Weights, reference: str, tokens: Int[Tensor, "batch pos"]
) -> ParityReport:
    """Question 1: our model beside the reference, both in float64 on the CPU."""
    state = {name: value.double() for name, value in weights.state.items()}
    model = DemoTransformer.from_state_dict(state, weights.cfg)
    return compare(model, REFERENCES[reference](weights.cfg, state), tokens)


@torch.no_grad()
def check_device(
    weights: Weights,
    device: str,
    dtype: torch.dtype,
    tokens: Int[Tensor, "batch pos"],
    *,
    reference: str | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> DeviceRun:
    """Questions 2 and 3 on one device in one dtype."""
    named = DeviceRun(device, str(dtype).removeprefix("torch."))
    if not is_available(device):
        return replace(named, not_checked=f"this machine has no {device}")
    if dtype is torch.float64 and not _has_float64(device):
        return replace(named, not_checked=f"{device} has no float64")

    on_step("first call")
    on_cpu = DemoTransformer.from_state_dict(
        {name: value.to(dtype) for name, value in weights.state.items()}, weights.cfg
    )
    model = DemoTransformer.from_state_dict(on_cpu.state_dict(), weights.cfg).to(device)
    given = tokens.to(device)
    first = model(given)
    oracle = float64_oracle(on_cpu)

    on_step("end to end")
    healthy = HEALTHY_RHO[dtype]
    end_to_end, seen_impact, allowed = _end_to_end(
        model, on_cpu, oracle, tokens, reference, healthy
    )

    isolated = []
    for path in PATHS:
        on_step(f"teacher-forced, {path}")
        case = f"{tokens.shape[0]} × {tokens.shape[1]} tokens"
        isolated += isolate(model, oracle, given, path=path, case=case)
    layer, cases = cliff_inputs(model)
    block = cast(HookedModule, model.blocks[layer])
    exact_block = cast(HookedModule, oracle.blocks[layer])
    for case, x in cases.items():
        on_step(f"teacher-forced, {case}")
        for path in ("fused", "explicit"):
            rows = isolate(block, exact_block, x, path=path, case=case)
            isolated += [
                replace(row, name=f"blocks.{layer}.{row.name}".rstrip(".")) for row in rows
            ]

    on_step("invariants")
    invariants = check_invariants(model, given, allowed, first)
    return replace(
        named,
        settings=device_settings(torch.device(device)),
        isolated=isolated,
        end_to_end=end_to_end,
        invariants=invariants,
        impact=seen_impact,
    )


def run_suite(
    weights: Weights,
    devices: Iterable[str],
    dtypes: Iterable[str],
    *,
    reference: str | None,
    no_reference: str = "",
    on_step: Callable[[str], None] = lambda step: None,
) -> SuiteReport:
    """Question 1 once, then each device in each dtype. Without a reference, `no_reference` says
    why, and the first question is NOT CHECKED."""
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
            tokens,
            reference=reference,
            on_step=lambda step, where=f"{device} {dtype}": on_step(f"{where}: {step}"),
        )
        for device in devices
        for dtype in dtypes
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


def _end_to_end(
    model: DemoTransformer,
    on_cpu: DemoTransformer,
    oracle: DemoTransformer,
    tokens: Int[Tensor, "batch pos"],
    reference: str | None,
    healthy: float,
) -> tuple[list[EndToEnd], Impact, float]:
    device = run(model, tokens.to(model.embed.W_E.device))
    with trusted():
        exact = run(oracle, tokens)
        errors, envelope = rms_errors(device, exact), healthy_envelope(on_cpu, tokens, exact)
        theirs = _reference_errors(on_cpu, tokens, reference, exact) if reference else {}
        allowed = 2 * healthy * row_difference(on_cpu(tokens), exact[LOGITS])
    rows = [
        EndToEnd(name, error, envelope[name], healthy, theirs.get(name))
        for name, error in errors.items()
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


def _has_float64(device: str) -> bool:
    return torch.device(device).type != "mps"
