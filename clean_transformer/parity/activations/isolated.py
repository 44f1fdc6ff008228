"""Checks the error that the device makes in each activation, apart from errors in its inputs.

The exact values come from the same model in float64 on the CPU (the oracle). When the oracle has
computed an activation, its exact value is compared with the device's activation, and then replaced
by it. So the oracle computes every activation from the inputs that the operation had on the device.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clean_transformer.activation_cache import ActivationCache
from clean_transformer.hooks import HookedModule, HookPoint
from clean_transformer.modules.mlp import MLP
from clean_transformer.parity.activations.bounds import (
    PASSED_ON,
    PRODUCTS,
    Rule,
    Seen,
    formula_of,
)
from clean_transformer.parity.activations.oracle_run import (
    AT_A_TIME,
    HEAD_AXIS,
    InFloat64,
    owner_of,
    run_oracle,
)
from clean_transformer.parity.limits import (
    Kind,
    error_ratios,
    index_of_largest,
    lower_precision,
    verdict_of,
)
from clean_transformer.parity.oracle import LOWER_PRECISION, UNIT_ROUNDOFF, trusted
from clean_transformer.parity.verdict import Verdict
from clean_transformer.support.numerics import upcast
from clean_transformer.support.selection import PER_HEAD

# A module computes the activations in INNER and PER_HEAD only if their hook points have hooks. So
# the watched hook points (those with hooks) decide which kernels run. PATHS maps the name of a path
# to a function that says, by name, which hook points are watched.
INNER = ("hook_attn_scores", "hook_pattern", "hook_scale", "hook_normalized")
PATHS: dict[str, Callable[[str], bool]] = {
    "fused": lambda point: point not in INNER + PER_HEAD,
    "explicit": lambda point: point not in PER_HEAD,
    "per head": lambda point: True,
}


@dataclass(frozen=True)
class Isolated:
    """The error that the device makes in one activation, apart from errors in its inputs.

    Errors are given as ratios: a ratio of 1 is about the error of one rounding (see
    `parity/limits.py`).

    `name` is the name of the activation, and `case` describes the input of the model. `path` says
    which hook points were watched, such as "fused" (see PATHS). `operation` is the kind of
    operation that computes the activation. `ratio` is the largest error ratio of all elements, and
    `worst_index` is the index of the element with this ratio. `healthy` is the largest ratio that
    passes. Above the ratio `wrong`, rounding cannot explain the error. `rms_ratio` is the root mean
    square of the ratios of all elements. `per_head` has the largest ratio of each attention head;
    it is empty if the activation has no heads. `bits` is the effective precision: −log₂ of the root
    mean square of error / G, where G is the number to which the allowed error is proportional (see
    `parity/scales.py`). `lower_precision` is the name of a lower precision, such as "TF32", that
    explains all errors. It is empty if there is none.
    """

    name: str
    case: str
    path: str
    operation: str
    ratio: float
    healthy: float
    wrong: float
    rms_ratio: float
    bits: float
    worst_index: tuple[int, ...]
    per_head: tuple[float, ...] = ()
    lower_precision: str = ""

    @property
    def verdict(self) -> Verdict:
        """PASS up to the ratio `healthy`, WRONG above the ratio `wrong`, and DEGRADED between them.

        If a lower precision explains the errors, the verdict is DEGRADED instead of WRONG.
        """
        return verdict_of(self.ratio, self.healthy, self.wrong, self.lower_precision)


@torch.no_grad()
def isolate(
    module: HookedModule,
    oracle: HookedModule,
    *inputs: Tensor,
    path: str = "explicit",
    case: str = "",
    autocast: torch.dtype | None = None,
) -> list[Isolated]:
    """Run the module on its device, and compare each watched activation with its exact value.

    `oracle` is the same module in float64 on the CPU. `path`, a key of PATHS, says which
    activations are watched. With "fused", attention and LayerNorm run as single kernels. With
    "explicit", the attention scores, the attention patterns, and the activations inside LayerNorm
    are also watched. With "per head", all activations are watched. `case` describes the inputs in
    the results. If `autocast` is a dtype, the module runs under autocast to this dtype.
    """
    inside = [name for name in watched_names(module, path) if name]
    device_type = inputs[0].device.type
    with torch.autocast(device_type, dtype=autocast, enabled=autocast is not None):
        if inside:
            output, cache = module.run_with_cache(*inputs, names_filter=inside)
        else:
            output, cache = module(*inputs), ActivationCache({}, module)
    with trusted():
        device = {name: value.cpu() for name, value in cache.items()}
        device[""] = output.cpu()
        # A module that runs several times has one row: that of its last call, which `device` has.
        rows: dict[tuple[str, int], Isolated] = {}

        def judge(name: str, head: int, value: Tensor, exact: Tensor, seen: InFloat64) -> None:
            part, point = owner_of(name)
            made_by = oracle.get_submodule(part)
            rule = (formula_of(made_by) or {}).get(point, PASSED_ON)
            u = _roundoff(rule.kind, value.dtype, autocast)
            rows[name, head] = _judge((name, case, path), value, exact, rule, made_by, seen, u)

        run_oracle(oracle, device, [x.cpu() for x in inputs], judge)
        heads: dict[str, list[Isolated]] = defaultdict(list)
        for (name, _), row in rows.items():
            heads[name].append(row)
        return [_of_all_heads(each) if len(each) > 1 else each[0] for each in heads.values()]


def watched_names(module: HookedModule, path: str) -> list[str]:
    """Return the names of the activations to watch for `path`, a key of `PATHS`.

    These are the hook points that `PATHS[path]` selects, and the outputs of `module` and of every
    `HookedModule` inside. The name of an output is the name of its module; the name of `module`
    itself is "".
    """
    return [
        name
        for name, part in module.named_modules()
        if isinstance(part, HookedModule)
        or (isinstance(part, HookPoint) and PATHS[path](name.split(".")[-1]))
    ]


def _roundoff(kind: Kind, dtype: torch.dtype, autocast: torch.dtype | None) -> float:
    # Autocast multiplies matrices in the autocast dtype, even if the result has another dtype.
    return UNIT_ROUNDOFF[autocast if autocast and kind in PRODUCTS else dtype]


def _judge(
    label: tuple[str, str, str],
    device: Tensor,
    exact: Tensor,
    rule: Rule,
    module: nn.Module,
    seen: InFloat64,
    u: float,
) -> Isolated:
    name, case, path = label
    axis = HEAD_AXIS.get(name.split(".")[-1], 0)

    def errors(seen: Seen, device: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
        error = (upcast(device) - exact).abs_()
        if bool(error.sum().isnan()):  # infinity − infinity
            error.masked_fill_(device == exact, 0.0)
        return error, error_ratios(error, rule.scale(module, seen, exact, u), u, device.dtype)

    # One head or some positions at a time, to save memory.
    pieces, along = [(seen, device, exact)], 0
    if name.endswith("hook_z"):
        heads = (seen.of_head(head) for head in range(exact.shape[axis]))
        of_heads = zip(
            heads, torch.split(device, 1, axis), torch.split(exact, 1, axis), strict=True
        )
        pieces, along = [*of_heads], axis
    elif isinstance(module, MLP) and rule is not PASSED_ON and exact.ndim == 3:
        seen_at = (
            seen.from_position(start) for start in range(0, max(exact.shape[1], 1), AT_A_TIME)
        )
        texts = (torch.split(x, AT_A_TIME, 1) for x in (device, exact))
        pieces, along = [*zip(seen_at, *texts, strict=True)], 1
    ratios = torch.cat([errors(*piece)[1] for piece in pieces], along)
    worst = index_of_largest(ratios)
    ratio, rms = float(ratios[worst]), float(ratios.norm()) / math.sqrt(ratios.numel())
    healthy, wrong = rule.kind.limits(rule.summed(module, seen), u)
    lower = ""
    if ratio > healthy and rule.kind in PRODUCTS:
        typical = rule.typical(module, seen, exact)
        lower = lower_precision(errors(seen, device, exact)[0], ratios, typical, healthy, u)
    others = [dim for dim in range(ratios.ndim) if dim != axis]
    return Isolated(
        name=name,
        case=case,
        path=path,
        operation=rule.kind.name,
        ratio=ratio,
        healthy=healthy,
        wrong=wrong,
        rms_ratio=rms,
        bits=-math.log2(rms * u) if rms else math.inf,
        worst_index=worst,
        per_head=tuple(ratios.amax(dim=others).tolist()) if axis else (),
        lower_precision=lower,
    )


def _of_all_heads(rows: list[Isolated]) -> Isolated:
    """Combine the results of single attention heads, in the order of the heads, into one result."""
    largest = max(range(len(rows)), key=lambda head: rows[head].ratio)
    worst, axis = rows[largest], HEAD_AXIS[rows[0].name.split(".")[-1]]
    index = (*worst.worst_index[:axis], largest, *worst.worst_index[axis + 1 :])
    relative = _rms(2**-row.bits for row in rows)
    # A lower precision changes nearly all elements, so it must explain the errors of every head.
    lower = {row.lower_precision for row in rows}
    coarsest = [name for name in LOWER_PRECISION.values() if name in lower]
    return replace(
        worst,
        rms_ratio=_rms(row.rms_ratio for row in rows),
        bits=-math.log2(relative) if relative else math.inf,
        worst_index=index,
        per_head=tuple(row.ratio for row in rows),
        lower_precision="" if "" in lower else coarsest[-1],
    )


def _rms(values: Iterable[float]) -> float:
    squares = [value**2 for value in values]
    return math.sqrt(sum(squares) / len(squares))
