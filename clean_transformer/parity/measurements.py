"""The measurements of a model on a device: isolated errors, drift, and single operations."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.analysis.comparison import LOGITS, Impact, impact, rms_errors, run
from clean_transformer.hooks import HookedModule
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.activations.black_box import (
    has_black_boxes,
    isolate_black_boxes,
    leaves,
)
from clean_transformer.parity.activations.drift import EndToEnd, healthy_envelope
from clean_transformer.parity.activations.isolated import PATHS, Isolated, isolate
from clean_transformer.parity.attempts import Attempts
from clean_transformer.parity.inputs import LENGTH, suite_tokens
from clean_transformer.parity.invariants import row_difference
from clean_transformer.parity.limits import HEALTHY_RHO, HEALTHY_RUNS, rounding
from clean_transformer.parity.locate import Located, in_words, locate
from clean_transformer.parity.operations.probes import run_probes
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.references.choose import REFERENCES
from clean_transformer.parity.results import first_bad_activation
from clean_transformer.parity.verdict import Check

# Sequence lengths at which kernels are known to switch to another algorithm. `isolated_errors` runs
# one block at these lengths, after it has run the whole model at the length `LENGTH`.
CLIFFS = (1, 2, 8, 9, 31, 32, 1023, 1024)


@dataclass(frozen=True)
class Subject:
    """The model under test, with the other models and the tokens that the measurements need.

    `model` is on the device under test. `on_cpu` is the same model in the same dtype on the CPU.
    `oracle` is the same model in float64 on the CPU. `tokens` are on the CPU. `autocast` is the
    dtype of autocast, or None if the model runs without autocast.
    """

    model: DemoTransformer
    on_cpu: DemoTransformer
    oracle: DemoTransformer
    tokens: Int[Tensor, "batch pos"]
    autocast: torch.dtype | None

    @property
    def given(self) -> Int[Tensor, "batch pos"]:
        """The tokens, on the device under test."""
        return self.tokens.to(self.model.embed.W_E.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that decides how large an error is healthy.

        This is the dtype of autocast. Without autocast, it is the dtype of the model.
        """
        return self.autocast or self.on_cpu.embed.W_E.dtype

    @property
    def has_black_boxes(self) -> bool:
        """Whether a module of the model has a `forward` of its own instead of its class's.

        The inner activations of such a module cannot be watched.
        """
        return has_black_boxes(self.model)

    def context(self) -> AbstractContextManager[object]:
        """A context manager for the model's runs: autocast, if it is enabled."""
        kind = self.given.device.type
        return torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None)


def cliff_inputs(model: DemoTransformer) -> tuple[int, dict[str, Tensor]]:
    """Return the index of a block, and a dict of named inputs [batch pos d_model] for this block.

    The inputs have lengths and memory layouts at which kernels are known to fail on some devices.
    The block is the fourth one, because GPT-2's residual stream has its largest entries from there
    on. If the model has fewer than four blocks, the block is the last one.
    """
    layer, n_ctx = min(3, model.cfg.n_layers - 1), model.cfg.n_ctx
    tokens = suite_tokens(model.cfg, 2, n_ctx).to(model.embed.W_E.device)
    residual = model.embed(tokens) + model.pos_embed(tokens)
    for block in list(model.blocks)[:layer]:
        residual = block(residual)
    lengths = sorted({min(length, n_ctx) for length in CLIFFS})
    cases = {f"1 × {length} tokens": residual[:1, :length].clone() for length in lengths}
    both = residual[:, :LENGTH]
    cases["permuted input"] = both.transpose(0, 1).contiguous().transpose(0, 1)
    cases["transposed input"] = both.mT.contiguous().mT
    cases["sliced input"] = residual[:, -both.shape[1] :]
    return layer, cases


def isolated_errors(
    subject: Subject, attempts: Attempts, on_step: Callable[[str], None]
) -> tuple[list[Isolated], Located | None]:
    """Return the isolated error of each activation, and the first wrong operation or None.

    The isolated error is the error that the device itself introduces in this activation.

    The whole model runs on `subject.tokens` once with each path of `PATHS`. Then one block runs on
    each of the `cliff_inputs`. If the model has black boxes (see `activations/black_box.py`), it
    runs only once, and the rows judge the outputs of its `leaves`. Before each step, `on_step` gets
    the step's name. If a run raises an exception, `attempts` keeps it, and the next run follows.

    If an activation does not pass, `locate` searches for the first wrong operation that contributes
    to the first such activation. The second result is None if every activation passes, if the
    search finds no wrong operation, or if the model has black boxes.
    """
    model, oracle, given = subject.model, subject.oracle, subject.given
    case = f"{given.shape[0]} × {given.shape[1]} tokens"
    if subject.has_black_boxes:
        step = "isolated, black boxes"
        on_step(step)
        judge = partial(isolate_black_boxes, model, oracle, given, case=case)
        return attempts.run(step, judge, []), None

    nothing: tuple[int, dict[str, Tensor]] = (0, {})
    layer, cliffs = attempts.run("isolated, inputs", partial(cliff_inputs, model), nothing)
    runs = [("", case, path, given) for path in PATHS]
    runs += [
        (f"blocks.{layer}", cliff, path, x)
        for cliff, x in cliffs.items()
        for path in ("fused", "explicit")
    ]
    isolated: list[Isolated] = []
    for name, case, path, x in runs:
        step = f"isolated, {case}, {path}"
        on_step(step)
        module, exact = (cast(HookedModule, each.get_submodule(name)) for each in (model, oracle))
        judge = partial(isolate, module, exact, x, path=path, case=case, autocast=subject.autocast)
        rows = attempts.run(step, judge, [])
        isolated += [replace(row, name=f"{name}.{row.name}".strip(".")) for row in rows]
    bad = first_bad_activation(isolated)
    if bad is None:
        return isolated, None
    name, _, path, x = next(run for run in runs if run[1:3] == (bad.case, bad.path))
    module = cast(HookedModule, model.get_submodule(name))
    inside = bad.name.removeprefix(name).lstrip(".")
    search = partial(locate, module, inside, path, x)
    located = attempts.run("the search for the first wrong operation", search, None)
    return isolated, located and replace(located, where=bad.name or LOGITS)


def probe_operations(device: str, dtype: torch.dtype) -> tuple[list[Check], Located | None]:
    """Run single operations on made-up tensors, called probes (see `operations/probes.py`).

    Returns a check for every probe in every memory layout, and a description of the first wrong
    operation. The description is None if the error of every operation is healthy.
    """
    results = run_probes(device, dtype)
    checks = [
        Check(
            f"{result.name}, {result.layout}",
            result.verdict,
            result.ratio,
            note=result.finding.diagnosis if result.finding else result.note,
        )
        for result in results
    ]
    found = ((result.finding, f"{result.name}, {result.layout}") for result in results)
    return checks, next((in_words(finding, where) for finding, where in found if finding), None)


def end_to_end(subject: Subject, reference: str | None) -> tuple[list[EndToEnd], Impact, float]:
    """Return the drift of each activation, the impact on predictions, and the invariants' limit.

    Drift is the error that an activation has accumulated since the first layer. The impact says how
    much the device's errors change the predictions. The limit is the argument `allowed` of
    `check_invariants`: the largest difference that the logits of two healthy runs may have. If
    `reference` names a reference, the rows of drift also hold the reference's own error on the CPU.
    """
    tokens, on_cpu, healthy = subject.tokens, subject.on_cpu, HEALTHY_RHO[subject.dtype]
    names = [*leaves(subject.model)] if subject.has_black_boxes else None
    device = run(subject.model, subject.given, names)
    with trusted():
        exact = run(subject.oracle, tokens, names)
        with subject.context():
            envelope = healthy_envelope(on_cpu, tokens, exact)
            off = row_difference(on_cpu(tokens), exact[LOGITS])
            allowed = HEALTHY_RUNS * healthy * max(off, rounding(subject.dtype))
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
