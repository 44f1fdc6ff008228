"""Probes: checks that run a single operation without a model.

The sizes and layouts of the tensors are like those with which devices have failed before.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clean_transformer.parity.attempts import failed_check
from clean_transformer.parity.operations.call import Operand, lay_out
from clean_transformer.parity.operations.check import check_operations
from clean_transformer.parity.operations.diagnosis import Finding
from clean_transformer.parity.verdict import Verdict

# The possible contents of a probe's tensor: normally distributed numbers (NORMAL), sampling weights
# ≥ 0 (WEIGHTS), booleans (TRUTH), or token ids from 0 to 49 (IDS).
NORMAL, WEIGHTS, TRUTH, IDS = "normal", "weights", "truth", "ids"


@dataclass(frozen=True)
class Probe:
    """A function to check, and a description of the tensors that are its arguments.

    `shapes` has the shape of each tensor. `contents` says what each tensor contains: NORMAL,
    WEIGHTS, TRUTH or IDS. `transposed` has the two axes that are swapped in memory when a tensor
    is transposed (see `_transposed`). The function runs with all tensors contiguous, and with all
    tensors transposed. If `each` is True, the function also runs with a single tensor transposed,
    sliced (see `_sliced`) or offset (see `_offset`), for each tensor in turn.
    """

    name: str
    function: Callable[..., Any]
    shapes: Sequence[tuple[int, ...]]
    contents: Sequence[str] = (NORMAL, NORMAL, NORMAL)
    transposed: tuple[int, int] = (-1, -2)
    each: bool = True


@dataclass(frozen=True)
class ProbeResult:
    """The result of one run of a probe.

    `name` is the probe's name. `layout` says in words which layouts the tensors had in this run,
    such as "all transposed". `ratio` is the largest error ratio of all ATen calls in this run (see
    `Judgment.ratio`). `verdict` is the verdict of `check_operations`. `finding` describes the first
    WRONG call. If no call is WRONG, `finding` describes the first DEGRADED call. If no call is
    DEGRADED either, `finding` is None. If the run raised an exception, `ratio` is None, and `note`
    describes the exception.
    """

    name: str
    layout: str
    ratio: float | None
    verdict: Verdict
    finding: Finding | None
    note: str = ""


def _attentions() -> Iterator[Probe]:
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention
    modes: dict[str, Callable[..., Tensor]] = {
        "": attend,
        ", is_causal": partial(attend, is_causal=True),
    }
    for queries, keys in product((1, 2, 8, 9, 31, 32, 33), (1023, 1024, 1025)):
        q, k = (1, 2, queries, 64), (1, 2, keys, 64)
        size = f"scaled_dot_product_attention {queries}x{keys}"
        each = (queries, keys) == (8, 1024)
        for mode, function in modes.items():
            yield Probe(size + mode, function, (q, k, k), transposed=(-2, -3), each=each)
        yield Probe(
            f"{size}, mask",
            lambda q, k, v, mask: attend(q, k, v, attn_mask=mask),
            (q, k, k, (queries, keys)),
            (NORMAL, NORMAL, NORMAL, TRUTH),
            transposed=(-2, -3),
            each=each,
        )


PROBES = (
    *(Probe(f"linear {n}", F.linear, ((9, n), (64, n), (64,))) for n in (768, 1023, 1024, 1025)),
    *(Probe(f"matmul {n}", torch.matmul, ((9, 64), (64, n))) for n in (768, 1023, 1024, 1025)),
    Probe("matmul 1025 rows", torch.matmul, ((1025, 64), (64, 9))),
    Probe("bmm", torch.bmm, ((2, 9, 64), (2, 64, 1025))),
    Probe("addmm", torch.addmm, ((64,), (9, 768), (768, 64))),
    Probe("layer_norm", lambda x, w, b: F.layer_norm(x, (768,), w, b), ((9, 768), (768,), (768,))),
    Probe("gelu", partial(F.gelu, approximate="tanh"), ((9, 3072),)),
    Probe("softmax", partial(torch.softmax, dim=-1), ((9, 1025),)),
    Probe("add", torch.add, ((9, 768), (9, 768))),
    Probe("where", torch.where, ((9, 65), (9, 65), (9, 65)), (TRUTH, NORMAL, NORMAL)),
    Probe(
        "masked_fill",
        lambda x, mask: x.masked_fill(mask, -math.inf),
        ((9, 65), (9, 65)),
        (NORMAL, TRUTH),
    ),
    Probe("embedding", F.embedding, ((2, 33), (50, 768)), (IDS, NORMAL)),
    Probe("argmax", partial(torch.argmax, dim=-1), ((9, 1025),)),
    Probe("topk", lambda x: x.topk(5), ((9, 1025),)),
    Probe("multinomial", lambda x: torch.multinomial(x, 5, True), ((9, 1025),), (WEIGHTS,)),
    *_attentions(),
)


def run_probes(device: str | torch.device, dtype: torch.dtype) -> list[ProbeResult]:
    """Run all probes in all layouts, with tensors on `device` in `dtype`. This takes seconds."""
    return [result for probe in PROBES for result in _run(probe, torch.device(device), dtype)]


def _run(probe: Probe, device: torch.device, dtype: torch.dtype) -> Iterator[ProbeResult]:
    generator = torch.Generator("cpu").manual_seed(0)
    values = [
        _values(content, shape, dtype, generator)
        for shape, content in zip(probe.shapes, probe.contents, strict=False)
    ]
    for name, layouts in _layouts(probe, [Operand.of(value) for value in values]):
        try:
            tensors = [
                lay_out(value, layout, device)
                for value, layout in zip(values, layouts, strict=True)
            ]
            report = check_operations(probe.function, *tensors)
        except Exception as error:
            failed = failed_check(probe.name, error)
            yield ProbeResult(probe.name, name, None, failed.verdict, None, failed.note)
            continue
        ratio = max(report.largest.values(), default=0.0)
        yield ProbeResult(probe.name, name, ratio, report.verdict, report.finding)


def _layouts(probe: Probe, plain: list[Operand]) -> Iterator[tuple[str, list[Operand]]]:
    changes: dict[str, Callable[[Operand], Operand]] = {
        "transposed": partial(_transposed, axes=probe.transposed),
        "sliced": _sliced,
        "offset": _offset,
    }
    yield "contiguous", plain
    yield "all transposed", [changes["transposed"](layout) for layout in plain]
    if probe.each and len(plain) > 1:
        for number, (name, change) in product(range(len(plain)), changes.items()):
            changed = [*plain]
            changed[number] = change(plain[number])
            if changed != plain:
                yield f"argument {number + 1} {name}", changed
    elif probe.each:
        yield "sliced", [_sliced(plain[0])]
        yield "offset", [_offset(plain[0])]


def _transposed(layout: Operand, axes: tuple[int, int]) -> Operand:
    """The layout of a tensor that has the same shape, but whose two `axes` are swapped in memory.

    If the tensor does not have both axes, return its layout unchanged.
    """
    if len(layout.shape) < -min(axes):
        return layout
    stride = torch.empty(layout.shape, device="meta").transpose(*axes).contiguous()
    return replace(layout, stride=stride.transpose(*axes).stride())


def _sliced(layout: Operand) -> Operand:
    """The layout of `wide[..., 8:]`, where `wide` is contiguous and has 8 more columns."""
    *rest, last = layout.shape
    stride = torch.empty((*rest, last + 8), device="meta").stride()
    return replace(layout, stride=stride, storage_offset=8)


def _offset(layout: Operand) -> Operand:
    """The layout of `long[1:]`, where `long` is contiguous and has one more entry on axis 0."""
    return replace(layout, storage_offset=math.prod(layout.shape[1:]))


def _values(
    content: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    normal = torch.randn(shape, generator=generator)
    if content == TRUTH:
        truth = normal > 0
        truth[..., 0] = True  # if a mask hid all keys of a query, the query's softmax would be NaN
        return truth
    if content == IDS:
        return torch.randint(50, shape, generator=generator)
    return normal.relu().to(dtype) if content == WEIGHTS else normal.to(dtype)
