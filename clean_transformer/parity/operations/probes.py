"""Probes: checks that run a single operation on random tensors, without a model.

The tensors have sizes and memory layouts with which devices have failed before.
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
from clean_transformer.parity.operations.contents import (
    EQUAL,
    IDS,
    LARGE,
    MASKED,
    NORMAL,
    SCORES,
    SMALL,
    SUBNORMAL,
    TRUTH,
    WEIGHTS,
    draw,
)
from clean_transformer.parity.operations.diagnosis import Finding
from clean_transformer.parity.verdict import Verdict

# Numbers of rows at which kernels are known to change.
ROWS = (1, 2, 3, 5, 16, 20, 80, 257, 513)


@dataclass(frozen=True)
class Probe:
    """A function to check, and a description of the tensors that are its arguments.

    `shapes` has the shape of each tensor. `contents` says what each tensor contains, such as NORMAL
    (see the list in `contents.py`). The function runs with all tensors contiguous, and with
    all tensors transposed. A transposed tensor keeps its shape, but the two axes in `transposed`
    are swapped in memory. If `each` is True, the function also runs with a single tensor
    transposed, sliced from a wider tensor, or with a storage offset. This is done for each tensor
    in turn.
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

    `name` is the probe's name. `layout` says in words which memory layouts the tensors had, such as
    "all transposed". `ratio` is the largest error of all ATen calls in this run, in units of one
    rounding error (see `Judgment.ratio`). `verdict` is the verdict on the run. `finding` describes
    the first call with the verdict WRONG, or else the first call with the verdict DEGRADED, or is
    None. If the run raised an exception, `ratio` is None, and `note` describes the exception.
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
    for d_head in (8, 16, 32, 80, 96, 128, 256):
        for queries, keys in ((1, 65), (33, 33)):
            q, k = (1, 2, queries, d_head), (1, 2, keys, d_head)
            size = f"scaled_dot_product_attention {queries}x{keys}, d_head {d_head}"
            yield Probe(size, attend, (q, k, k), transposed=(-2, -3), each=False)
    heads = (2, 2, 33, 64)
    yield Probe(
        "scaled_dot_product_attention, scores of about 100",
        lambda q, k, v: attend(128 * q, k, v),
        (heads, heads, heads),
        transposed=(-2, -3),
        each=False,
    )
    for content in (LARGE, EQUAL, SMALL):
        q, contents = (2, 2, 9, 64), (content, NORMAL, NORMAL)
        name = f"scaled_dot_product_attention, {content} queries"
        yield Probe(name, attend, (q, q, q), contents, (-2, -3), each=False)
    yield Probe(
        "scaled_dot_product_attention, padding mask",
        lambda q, k, v, mask: attend(q, k, v, attn_mask=mask),
        ((3, 2, 9, 64), (3, 2, 9, 64), (3, 2, 9, 64), (3, 1, 9, 9)),
        (NORMAL, NORMAL, NORMAL, TRUTH),
        (-2, -3),
        each=False,
    )
    heads, name = (2, 2, 9, 64), "scaled_dot_product_attention, queries without a key"
    yield Probe(name, _unseeing, (heads, heads, heads), transposed=(-2, -3), each=False)


def _unseeing(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Run attention forward and backward; the first two queries see no key."""
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(-2)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.autograd.grad(output, (q, k, v), torch.ones_like(output))


def _unusual() -> Iterator[Probe]:
    """Yield probes with unusual numbers, such as very large ones, or with large tensors (4 MiB)."""
    layer_norm = partial(F.layer_norm, normalized_shape=(64,))
    gelu = partial(F.gelu, approximate="tanh")
    for content in (LARGE, EQUAL, SMALL, SUBNORMAL):
        yield Probe(f"gelu, {content} numbers", gelu, ((9, 64),), (content,), each=False)
        yield Probe(
            f"layer_norm, {content} numbers", layer_norm, ((9, 64),), (content,), each=False
        )
        both = (content, content)
        yield Probe(f"add, {content} numbers", torch.add, ((9, 64), (9, 64)), both, each=False)
        yield Probe(f"linear, {content} numbers", F.linear, ((9, 64), (32, 64)), both, each=False)
    for content in (SCORES, EQUAL, MASKED, SUBNORMAL):
        functions: dict[str, Callable[..., Any]] = {
            "softmax": partial(torch.softmax, dim=-1),
            "log_softmax": partial(torch.log_softmax, dim=-1),
            "argmax": partial(torch.argmax, dim=-1),
            "topk": lambda x: x.topk(5),
            "sort": partial(torch.sort, descending=True),
        }
        for name, function in functions.items():
            yield Probe(f"{name}, {content} numbers", function, ((9, 65),), (content,), each=False)
    million = (1024, 1025)
    yield Probe("add 4 MiB", torch.add, (million, million), each=False)
    yield Probe("gelu 4 MiB", gelu, (million,), each=False)


BADDBMM = ((2, 9, 33), (2, 9, 64), (2, 64, 33))
ONE_ROW = ((1, 33), (1, 64), (64, 33))
PROBES = (
    *(Probe(f"linear {n}", F.linear, ((9, n), (64, n), (64,))) for n in (768, 1023, 1024, 1025)),
    *(Probe(f"matmul {n}", torch.matmul, ((9, 64), (64, n))) for n in (768, 1023, 1024, 1025)),
    Probe("matmul 768 by 768", torch.matmul, ((9, 768), (768, 768)), each=False),
    # As for the gradient with respect to the input of GPT-2's unembedding.
    Probe("matmul 50257 terms", torch.matmul, ((17, 50257), (50257, 17)), each=False),
    Probe("matmul 1025 rows", torch.matmul, ((1025, 64), (64, 9))),
    *(Probe(f"linear {n} rows", F.linear, ((n, 64), (96, 64), (96,)), each=False) for n in ROWS),
    *(Probe(f"linear {n} rows, 1025", F.linear, ((n, 16), (1025, 16)), each=False) for n in ROWS),
    Probe("bmm", torch.bmm, ((2, 9, 64), (2, 64, 1025))),
    Probe("addmm", torch.addmm, ((64,), (9, 768), (768, 64))),
    Probe("baddbmm, alpha", partial(torch.baddbmm, beta=0.5, alpha=0.5), BADDBMM, each=False),
    Probe(
        "baddbmm, 1 row, beta 0",
        partial(torch.baddbmm, beta=0, alpha=0.5),
        [(2, *s) for s in ONE_ROW],
    ),
    Probe("addmm, 1 row, beta 0", partial(torch.addmm, beta=0, alpha=0.5), ONE_ROW),
    Probe("layer_norm", lambda x, w, b: F.layer_norm(x, (768,), w, b), ((9, 768), (768,), (768,))),
    Probe("gelu", partial(F.gelu, approximate="tanh"), ((9, 3072),)),
    Probe("softmax", partial(torch.softmax, dim=-1), ((9, 1025),)),
    Probe("add", torch.add, ((9, 768), (9, 768))),
    Probe("add, expanded", lambda x, y: x + y.expand_as(x), ((2, 9, 64), (9, 64)), each=False),
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
    *_unusual(),
)


def run_probes(device: str | torch.device, dtype: torch.dtype) -> list[ProbeResult]:
    """Run all probes in all memory layouts, with tensors on `device` in `dtype`.

    Returns a result for each probe and layout. This takes seconds.
    """
    return [result for probe in PROBES for result in _run(probe, torch.device(device), dtype)]


def _run(probe: Probe, device: torch.device, dtype: torch.dtype) -> Iterator[ProbeResult]:
    generator = torch.Generator("cpu").manual_seed(0)
    values = [
        draw(content, shape, dtype, generator)
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
    """Return the layout of a tensor of the same shape whose two `axes` are swapped in memory.

    If the tensor does not have both axes, return its layout unchanged.
    """
    if len(layout.shape) < -min(axes):
        return layout
    stride = torch.empty(layout.shape, device="meta").transpose(*axes).contiguous()
    return replace(layout, stride=stride.transpose(*axes).stride())


def _sliced(layout: Operand) -> Operand:
    """Return the layout of `wide[..., 8:]`, where `wide` is contiguous and has 8 columns more."""
    *rest, last = layout.shape
    stride = torch.empty((*rest, last + 8), device="meta").stride()
    return replace(layout, stride=stride, storage_offset=8)


def _offset(layout: Operand) -> Operand:
    """Return the layout of `long[1:]`; `long` is contiguous and has one entry more on axis 0."""
    return replace(layout, storage_offset=math.prod(layout.shape[1:]))
