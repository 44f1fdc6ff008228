"""Runs each use on the device part by part, and judges every part by rounding alone.

A part gets the device's own inputs, call by call, with a KV cache of its own. The oracle gets the
same inputs in float64, all in one call. So a decoding step is judged like any other step, also in
half precision, and only one part at a time is held in float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from clean_transformer.model import DemoTransformer
from clean_transformer.modules.layer_norm import LayerNorm
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.limits import (
    ADD,
    LAYER_NORM,
    LINEAR,
    PART,
    Kind,
    error_ratios,
    index_of_largest,
    layer_norm_scales,
    sum_scale,
)
from clean_transformer.parity.locate import Located, in_words
from clean_transformer.parity.operations.check import first_wrong_operation
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, trusted
from clean_transformer.parity.rounding import RandomRounding
from clean_transformer.parity.uses.parts import ExactParts, Part, block, embed, run
from clean_transformer.parity.uses.table import Use, uses
from clean_transformer.parity.verdict import Verdict, worst

# Draws of random rounding. A text longer than LONG has so many rows that one draw is enough.
DRAWS, LONG = 4, 100
# In a long use, this many blocks are judged, and this many rows of logits. The first and the last
# are always among them; the others are drawn anew in each run.
BLOCKS, ROWS = 4, 64


@dataclass(frozen=True)
class UseResult:
    """What one use gave: a row for each part that was judged, in the order of the forward pass.

    `not_checked` is the reason if it did not run.
    """

    use: Use
    rows: tuple[Isolated, ...] = ()
    located: Located | None = None
    not_checked: str = ""

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the rows."""
        return Verdict.NOT_CHECKED if self.not_checked else worst(row.verdict for row in self.rows)

    @property
    def first_failure(self) -> Isolated | None:
        """The first part that does not pass."""
        return next((row for row in self.rows if row.verdict is not Verdict.PASS), None)


@dataclass(frozen=True)
class Judge:
    """Judges the uses of one model, which is on the device under test.

    `products` is the dtype of matrix products where it is another than the model's: autocast's.
    """

    model: DemoTransformer
    exact: ExactParts
    generator: torch.Generator
    products: torch.dtype | None = None

    @torch.no_grad()
    def judge(self, use: Use, *, locates: bool) -> UseResult:
        """Run the use and judge each part; with `locates`, look for the operation that is wrong."""
        rows, located = [], None
        for row, part, inputs in self._parts(use):
            rows.append(row)
            if locates and located is None and row.verdict is not Verdict.PASS:
                finding = first_wrong_operation(run, use, part, inputs, self.model.cache_class)
                located = finding and in_words(finding, row.name)
        return UseResult(use, tuple(rows), located)

    def _parts(self, use: Use) -> Iterator[tuple[Isolated, Part, list[Tensor]]]:
        """A row for each part that is judged, with the part and what it was given."""
        model, cache_class = self.model, self.model.cache_class
        part: Part = partial(embed, model)
        inputs = [call.to(model.device) for call in use.calls(model.cfg)]
        outputs = run(use, part, inputs, cache_class)
        with trusted():
            yield self._embedding(use, inputs, outputs), part, inputs
        judged = self._layers(use)
        for layer, module in enumerate(model.blocks):
            part, inputs = partial(block, module), outputs
            outputs = run(use, part, inputs, cache_class)
            if layer in judged:
                with trusted():
                    exact = self.exact.block(layer)
                    row = self._part(f"blocks.{layer}", use, exact, inputs, outputs)
                yield row, part, inputs
        if use.is_cached:
            outputs = [call[:, -1:] for call in outputs]
            use = replace(use, reads=(1,) * len(outputs), padding=())
        part, inputs = lambda x, cache: model.ln_final(x), outputs
        outputs = run(use, part, inputs)
        with trusted():
            yield self._layer_norm(use, inputs, outputs), part, inputs
        part, inputs = lambda x, cache: model.unembed(x), outputs
        outputs = run(use, part, inputs)
        with trusted():
            yield self._logits(use, inputs, outputs), part, inputs

    def _layers(self, use: Use) -> set[int]:
        n_layers = len(self.model.blocks)
        if use.length <= LONG or n_layers <= BLOCKS:
            return {*range(n_layers)}
        drawn = torch.randperm(n_layers, generator=self.generator)[: BLOCKS - 2].tolist()
        return {0, n_layers - 1, *drawn}

    def _part(
        self,
        name: str,
        use: Use,
        exact_part: Part,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> Isolated:
        """A part's error, row by row, in units of what random rounding makes of it."""
        given, got = use.in_one(inputs).double(), use.in_one(outputs).double()
        exact = exact_part(given, use.cache(whole=True))
        draws = 1 if use.length > LONG else DRAWS
        envelope = torch.zeros_like(exact[..., 0])
        for seed in range(draws):
            with RandomRounding(self.exact.dtype, self.products, seed):
                moved = exact_part(given, use.cache(whole=True))
            envelope += (moved - exact).square().mean(dim=-1) / draws
        error = (got - exact).square().mean(dim=-1).sqrt()
        ratios = torch.where(error == 0, 0.0, error / envelope.sqrt())
        ratios = ratios.nan_to_num(math.inf, math.inf).where(use.is_token, 0.0)
        healthy, wrong = PART.limits(1, UNIT_ROUNDOFF[self.products or self.exact.dtype])
        size = exact.square().mean(dim=-1).sqrt()
        relative = float((error / size).where(use.is_token, 0.0).nan_to_num(math.inf).max())
        return Isolated(
            name=name,
            case=use.case,
            path="use",
            operation=PART.name,
            ratio=float(ratios.max()),
            healthy=healthy,
            wrong=wrong,
            rms_ratio=float(ratios.square().mean().sqrt()),
            bits=-math.log2(relative) if relative else math.inf,
            worst_index=index_of_largest(ratios),
        )

    def _embedding(self, use: Use, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Isolated:
        token, position = self.exact.embeddings(use.in_one(inputs), use.cache(whole=True))
        got, exact, scale = (
            each.where(use.is_token[..., None], torch.zeros((), dtype=each.dtype))
            for each in (use.in_one(outputs), token + position, token.abs() + position.abs())
        )
        return _elementwise("embed + pos_embed", use, got, exact, scale, ADD)

    def _layer_norm(
        self, use: Use, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> Isolated:
        residual = use.in_one(inputs).double()
        module = self.exact.ln_final()
        scale = layer_norm_scales(residual, self.exact.cfg.eps)[0]
        if isinstance(module, LayerNorm):
            scale = scale * module.w.abs() + module.b.abs()
        got, exact = use.in_one(outputs), module(residual)
        return _elementwise("ln_final", use, got, exact, scale, LAYER_NORM)

    def _logits(self, use: Use, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Isolated:
        """Rows of logits, drawn if there are many, by the bound of a matrix product."""
        x, logits = (use.in_one(calls).flatten(0, 1) for calls in (inputs, outputs))
        drawn = torch.randperm(len(x), generator=self.generator)[: ROWS - 2].tolist()
        rows = sorted({0, len(x) - 1, *drawn})
        x, logits = x[rows].double(), logits[rows]
        W_U, b_U = self.exact.unembedding()
        exact, u = x @ W_U + b_U, UNIT_ROUNDOFF[self.products or logits.dtype]
        scale = sum_scale(exact, lambda size: size(x) @ size(W_U) + size(b_U), u)
        return _elementwise("unembed", use, logits, exact, scale, LINEAR, len(W_U), u)


def _elementwise(
    name: str,
    use: Use,
    got: Tensor,
    exact: Tensor,
    scale: Tensor,
    kind: Kind,
    terms: int = 1,
    u: float | None = None,
) -> Isolated:
    """Errors in units of u G, of a sum of so many terms."""
    u = UNIT_ROUNDOFF[got.dtype] if u is None else u
    healthy, wrong = kind.limits(terms, u)
    error = torch.where(got == exact, 0.0, (got.double() - exact).abs())
    ratios = error_ratios(error, scale, u, got.dtype)
    rms = float(ratios.square().mean().sqrt())
    return Isolated(
        name=name,
        case=use.case,
        path="use",
        operation=kind.name,
        ratio=float(ratios.max()),
        healthy=healthy,
        wrong=wrong,
        rms_ratio=rms,
        bits=-math.log2(rms * u) if rms else math.inf,
        worst_index=index_of_largest(ratios),
    )


def judge_uses(
    judge: Judge,
    *,
    locates: bool = True,
    cached: str = "",
    on_step: Callable[[str], None] = lambda step: None,
) -> list[UseResult]:
    """The result of every use. `cached` is the reason why uses with a cache cannot run, if any."""
    results = []
    for use in uses(judge.model.cfg):
        on_step(use.case)
        if use.is_cached and cached:
            results.append(UseResult(use, not_checked=cached))
        else:
            results.append(judge.judge(use, locates=locates))
    return results
