"""Measures a model's errors on a device, and checks single operations.

An isolated error is what the device itself introduces in one activation. Drift is the error that an
activation has accumulated since the first layer.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clean_transformer.analysis.comparison import LOGITS, Impact, impact, rms_difference, rms_errors
from clean_transformer.hooks import HookedModule
from clean_transformer.model import DemoTransformer
from clean_transformer.parity.activations.black_box import (
    BLACK_BOX,
    has_black_boxes,
    isolate_black_boxes,
)
from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import PATHS, Isolated, isolate
from clean_transformer.parity.attempts import Attempts
from clean_transformer.parity.cliffs import cliff_runs
from clean_transformer.parity.invariants import row_difference
from clean_transformer.parity.limits import HEALTHY_DIFFERENCE, HEALTHY_RHO, largest_drift, rounding
from clean_transformer.parity.locate import Located, in_words, locate
from clean_transformer.parity.operations.probes import run_probes
from clean_transformer.parity.oracle import trusted
from clean_transformer.parity.references.choose import REFERENCES
from clean_transformer.parity.results import first_bad_activation
from clean_transformer.parity.rounding import RandomRounding
from clean_transformer.parity.uses.parts import ExactParts
from clean_transformer.parity.verdict import Check

# How often the oracle runs under `RandomRounding`. A mean over an activation needs few runs.
DRAWS = 3


@dataclass(frozen=True)
class Subject:
    """The model under test, the same model in float64, and the tokens for the measurements.

    `model` is on the device under test. `exact` builds single modules of the model in float64 on
    the CPU; their results count as exact. `tokens` are on the CPU. `autocast` is the dtype of
    autocast, or None if the model runs without autocast.
    """

    model: DemoTransformer
    exact: ExactParts
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
        return self.autocast or self.exact.dtype

    def context(self) -> AbstractContextManager[object]:
        """A context manager for the model's runs: autocast, if it is enabled."""
        kind = self.given.device.type
        return torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None)


@dataclass(frozen=True)
class DeviceRecord:
    """Activations from one run of the model on the device.

    `inputs` maps the name of each block, such as "blocks.0", and of the last LayerNorm to the input
    [batch pos d_model] of this module. `normalized` is the output of the last LayerNorm. `logits`
    are the model's output [batch pos d_vocab].
    """

    inputs: dict[str, Float[Tensor, "batch pos d_model"]]
    normalized: Float[Tensor, "batch pos d_model"]
    logits: Float[Tensor, "batch pos d_vocab"]


def record_run(subject: Subject) -> DeviceRecord:
    """Run the model on `subject.tokens`, on the device under test, and record activations.

    No hook point has a hook. With hooks, the model would run other kernels (see `PATHS` in
    `activations/isolated.py`).
    """
    model, calls = subject.model, dict[str, tuple[Tensor, Tensor]]()

    def keep(name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        calls[name] = (args[0], output)

    blocks = {f"blocks.{layer}": block for layer, block in enumerate(model.blocks)}
    with ExitStack() as placed:
        for name, part in {**blocks, "ln_final": model.ln_final}.items():
            placed.callback(part.register_forward_hook(partial(keep, name)).remove)
        logits = model(subject.given)
    inputs = {name: given for name, (given, _) in calls.items()}
    return DeviceRecord(inputs, calls["ln_final"][1], logits)


def isolated_errors(
    subject: Subject, record: DeviceRecord, attempts: Attempts, on_step: Callable[[str], None]
) -> tuple[list[Isolated], Located | None]:
    """Return the isolated error of each activation, and the first wrong operation or None.

    The isolated error is the error that the device itself introduces in the activation.

    Each block and the last LayerNorm run alone on their inputs in `record`. They run once for each
    entry of `PATHS`, because the hook points that have hooks decide which kernels run. The
    `cliff_runs` of one block follow. If a module of the model is compiled or optimized, its
    inner activations cannot be watched. Then each module runs only once, and only the outputs of
    modules are judged. Embeddings and logits are judged elsewhere (see `uses/judge.py`).

    Before each module, `on_step` gets a text with the module's name. Only one module at a time is
    in memory in float64. If a run raises an exception, `attempts` keeps the exception, and the next
    run follows.

    If an activation does not pass, `locate` searches for the first wrong operation that contributes
    to the first such activation. The second result is None if every activation passes, if the
    search finds no wrong operation, or if a module is compiled or optimized.
    """
    model, (batch, length) = subject.model, subject.tokens.shape
    case, is_watched = f"{batch} × {length} tokens", not has_black_boxes(subject.model)
    paths = PATHS if is_watched else (BLACK_BOX,)
    runs = [(name, case, path, x) for name, x in record.inputs.items() for path in paths]
    if is_watched:
        cliffs = partial(cliff_runs, subject.exact, model.embed.W_E)
        runs += attempts.run("isolated, inputs", cliffs, [])
    isolated: list[Isolated] = []
    for part in record.inputs:
        on_step(f"isolated, {part}")
        with trusted():
            whole = subject.exact.module(part)
        for name, case, path, x in (run for run in runs if f"{run[0]}.".startswith(f"{part}.")):
            module = cast(HookedModule, model.get_submodule(name))
            exact = cast(HookedModule, whole.get_submodule(name.removeprefix(part).lstrip(".")))
            if path == BLACK_BOX:
                judge = partial(isolate_black_boxes, module, exact, x, case=case)
            else:
                judge = partial(isolate, module, exact, x, path=path, case=case)
                judge = partial(judge, autocast=subject.autocast)
            rows = attempts.run(f"isolated, {name}, {case}, {path}", judge, [])
            isolated += [replace(row, name=f"{name}.{row.name}".strip(".")) for row in rows]
    bad = first_bad_activation(isolated)
    if bad is None or not is_watched:
        return isolated, None
    name, _, path, x = next(
        run
        for run in runs
        if run[1:3] == (bad.case, bad.path) and f"{bad.name}.".startswith(f"{run[0]}.")
    )
    module = cast(HookedModule, model.get_submodule(name))
    inside = bad.name.removeprefix(name).lstrip(".")
    search = partial(locate, module, inside, path, x)
    located = attempts.run("the search for the first wrong operation", search, None)
    return isolated, located and replace(located, where=bad.name)


def probe_operations(device: str, dtype: torch.dtype) -> tuple[list[Check], Located | None]:
    """Run single operations on random tensors (see `operations/probes.py`).

    Returns a check for every operation in every memory layout, and a description of the first wrong
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


def end_to_end(
    subject: Subject, record: DeviceRecord, reference: str | None
) -> tuple[list[EndToEnd], Impact, float]:
    """Return the drift of the residual stream, its effect on the predictions, and a limit.

    Drift is the error that an activation has accumulated since the first layer. The limit is the
    largest difference that the logits of two healthy runs may have (see `allowed` in
    `check_invariants`). If `reference` names another implementation of GPT-2, the results for drift
    also hold the error of this implementation on the CPU.
    """
    healthy, cfg = HEALTHY_RHO[subject.dtype], subject.exact.cfg
    outputs = [*record.inputs.values(), record.normalized, record.logits]
    exact, rows, off = dict[str, Tensor](), list[EndToEnd](), 0.0
    with trusted():
        ceiling = largest_drift(cfg, subject.dtype)
        for device, (name, value, moved) in zip(outputs, _float64_run(subject), strict=True):
            exact[name], copies = value, value.repeat(len(moved) // len(value), 1, 1)
            envelope = min(
                rms_difference(moved, copies), ceiling * float(value.square().mean().sqrt())
            )
            rows.append(EndToEnd(name, rms_difference(device.cpu(), value), envelope, healthy))
            if name == LOGITS:
                off = min(row_difference(moved, copies), ceiling)
        allowed = HEALTHY_DIFFERENCE[subject.dtype] * max(off, rounding(subject.dtype))
        theirs = (
            _reference_errors(subject.exact, subject.tokens, reference, exact) if reference else {}
        )
        rows = [replace(row, reference_error=theirs.get(row.name)) for row in rows]
        return rows, impact(record.logits.cpu(), exact[LOGITS], subject.tokens), allowed


def _float64_run(subject: Subject) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Run the model in float64, once exactly and DRAWS times with random rounding errors.

    Yields (name, exact, moved) for each activation of the residual stream, for the output of the
    last LayerNorm, and for the logits. `exact` is the exact value. `moved` has the values of the
    runs under `RandomRounding`, concatenated along the batch. For the logits, which are the largest
    activation, `moved` has the values of only one run.
    """
    exact, inexactly = subject.exact, RandomRounding(subject.exact.dtype, subject.autocast)
    token, position = exact.embeddings(subject.tokens, None)
    x, copies = token + position, (DRAWS, 1, 1)
    with inexactly:
        moved = token.repeat(copies) + position.repeat(copies)
    yield "blocks.0.hook_resid_pre", x, moved
    names = {f"blocks.{layer}": "hook_resid_post" for layer in range(exact.cfg.n_layers)}
    for path, point in {**names, "ln_final": ""}.items():
        part = exact.module(path)
        x = part(x)
        with inexactly:
            moved = part(moved)
        yield f"{path}.{point}".strip("."), x, moved
    x = exact.logits(x)
    with inexactly:
        moved = exact.logits(moved[: len(x)])
    yield LOGITS, x, moved


def _reference_errors(
    exact: ExactParts, tokens: Int[Tensor, "batch pos"], name: str, activations: dict[str, Tensor]
) -> dict[str, float]:
    """Return the root mean square error of each activation in another implementation of GPT-2.

    `name` is the name of this implementation. It runs on the CPU in the dtype of the model under
    test. `activations` has the exact values. Activations that the implementation does not cache, or
    caches in another shape, are left out.
    """
    state = {key: value.to(exact.dtype) for key, value in exact.state.items()}
    theirs = REFERENCES[name](exact.cfg, state)
    ours = {theirs.aliases.get(key, key): value for key, value in theirs.run(tokens).items()}
    same_shape = {
        key: value
        for key, value in ours.items()
        if key in activations and value.shape == activations[key].shape
    }
    return rms_errors(same_shape, activations)
