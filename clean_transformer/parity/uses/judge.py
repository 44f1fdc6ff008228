"""Checks the error of each part of the model in one use of the model, such as generating text.

The parts are the embeddings, each block, the last LayerNorm and the unembedding. On the device,
the model is called several times, for example once for each new token, and each part runs in each
call. The exact results come from the same part in float64 on the CPU, with the inputs that the part
had on the device. The float64 part runs only once, on the inputs of all calls together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from clean_transformer.kv_cache import KVCache
from clean_transformer.model import DemoTransformer
from clean_transformer.modules.layer_norm import LayerNorm
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.attempts import Attempts
from clean_transformer.parity.limits import ADD, LAYER_NORM, LINEAR, PART
from clean_transformer.parity.locate import Located, in_words
from clean_transformer.parity.operations.check import check_operations
from clean_transformer.parity.oracle import UNIT_ROUNDOFF, trusted
from clean_transformer.parity.rounding import RandomRounding
from clean_transformer.parity.scales import Size, layer_norm_scales, sum_scale
from clean_transformer.parity.uses.parts import ExactParts, Part, block, embed, run
from clean_transformer.parity.uses.rows import by_rows, elementwise, first_position
from clean_transformer.parity.uses.table import Use
from clean_transformer.parity.verdict import Check, Verdict, worst

# The oracle runs a block DRAWS times under random rounding (`parity/rounding.py`). To save time, it
# runs the block only LONG_DRAWS times if the use has more than LONG positions. The first FIRST
# positions run FIRST_DRAWS times. GPT-2 has its largest activations at these positions, so that one
# element can cause most of the error at a position, and an average over few runs is unreliable.
FIRST, FIRST_DRAWS, DRAWS, LONG, LONG_DRAWS = 8, 12, 3, 100, 1
# All blocks run the same operations in the same shapes, and `isolated_errors` checks every block.
# So each use judges at most BLOCKS blocks, and the logits at about ROWS positions in total. The
# first and the last block, and the first and the last position of the logits, are always judged.
# The other blocks and positions are chosen at random.
BLOCKS, ROWS = 3, 64
# Two uses may run a block on nearly the same inputs. Then random rounding changes the outputs by
# nearly the same amount, so this amount is computed only once. Two inputs at a position are nearly
# the same if their root mean square difference is at most NEARLY × the root mean square of one.
NEARLY = 0.01


def rms(x: Tensor) -> Tensor:
    """Return the root mean square of `x` over its last axis."""
    return x.square().mean(dim=-1).sqrt()


@dataclass(frozen=True)
class UseResult:
    """The result of one use of the model, such as generating text.

    `rows` has one result for each checked part of the model, such as a block, in the order in which
    the parts ran. If a part raised an exception, the last row describes it.

    `wrong_from` is the first position with too large an error, in the first part that does not
    pass. It is None if all parts pass, and always None for training and sampling. `located` is the
    first wrong operation, such as a matrix product, or None if none was found.
    """

    use: Use
    rows: tuple[Isolated | Check, ...]
    wrong_from: int | None = None
    located: Located | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of the rows."""
        return worst(row.verdict for row in self.rows)

    @property
    def first_failure(self) -> Isolated | Check | None:
        """The first row whose verdict is not PASS, or None if all rows pass."""
        return next((row for row in self.rows if row.verdict is not Verdict.PASS), None)


@dataclass(frozen=True)
class Judged:
    """The result for one part of the model, such as a block, and what is needed to run it again.

    `row` is the result. `wrong_from` is the first position with too large an error, or the first
    checked position if there is none. `part` runs the part on the device, and `inputs` has its
    input in each call of the model.
    """

    row: Isolated
    wrong_from: int
    part: Part
    inputs: list[Tensor]


@dataclass(frozen=True)
class Judge:
    """Checks how accurately the device computes `model` in a use, such as generating text.

    `exact` builds the model's blocks and other modules in float64. `generator` chooses at random
    which blocks are checked, and at which positions the logits are checked. `products` is the dtype
    in which the device multiplies matrices: the autocast dtype, or None for the model's own dtype.
    `cache_class` is the class of the KV caches. Compiled models need `StaticKVCache`, because
    `torch.compile` would compile them again for each length of a `KVCache`.
    """

    model: DemoTransformer
    exact: ExactParts
    generator: torch.Generator
    products: torch.dtype | None = None
    cache_class: type[KVCache] = KVCache
    # The last inputs of a block and their envelope, by the layer and the shape of the inputs.
    _known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def __call__(self, use: Use, *, locates: bool) -> UseResult:
        """Run the model in one use, such as generating text, and check each part, such as a block.

        If `locates` is True and a part does not pass, also search the first such part for a wrong
        operation. If an exception is raised, the last row of the result describes it.
        """
        parts: list[Judged] = []
        attempts = Attempts()
        attempts.run(use.case, lambda: parts.extend(self._parts(use)), None)
        bad = next((each for each in parts if each.row.verdict is not Verdict.PASS), None)
        located = None
        if bad is not None and locates:
            name = f"the search for the first wrong operation, {use.case}"
            located = attempts.run(name, partial(self._locate, use, bad), None)
        rows = [each.row for each in parts]
        return UseResult(use, (*rows, *attempts.failed), bad.wrong_from if bad else None, located)

    def _locate(self, use: Use, bad: Judged) -> Located | None:
        """Return the first wrong operation in the failing part `bad`, or None if none is found."""
        found = check_operations(run, use, bad.part, bad.inputs, self.cache_class).finding
        return in_words(found, f"{bad.row.name}, {use.case}") if found else None

    def _parts(self, use: Use) -> Iterator[Judged]:
        model, cache_class = self.model, self.cache_class

        def judged(judge: Callable[..., tuple[Isolated, int]], *place: int) -> Judged:
            with trusted():
                row, first = judge(use, *place, inputs, outputs)
            return Judged(row, positions[first], part, inputs)

        positions = [*range(use.length)]
        part: Part = partial(embed, model)
        inputs = [call.to(model.device) for call in use.calls(model.cfg)]
        outputs = run(use, part, inputs, cache_class)
        yield judged(self._embedding)
        layers = self._layers()
        for layer, module in enumerate(model.blocks):
            part, inputs = partial(block, module), outputs
            outputs = run(use, part, inputs, cache_class)
            if layer in layers:
                yield judged(self._block, layer)
        if use.is_cached:
            positions = [end - 1 for end in accumulate(use.reads)]
            outputs = [call[:, -1:] for call in outputs]
            use = replace(use, reads=(1,) * len(outputs), padding=())
        part, inputs = lambda residual, cache: model.ln_final(residual), outputs
        outputs = run(use, part, inputs)
        yield judged(self._layer_norm)
        part, inputs = lambda residual, cache: model.unembed(residual), outputs
        outputs = run(use, part, inputs)
        yield judged(self._logits)

    def _layers(self) -> set[int]:
        n_layers = len(self.model.blocks)
        if n_layers <= BLOCKS:
            return {*range(n_layers)}
        drawn = torch.randperm(n_layers, generator=self.generator)[: BLOCKS - 2].tolist()
        return {0, n_layers - 1, *drawn}

    def _embedding(
        self, use: Use, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> tuple[Isolated, int]:
        token, position = self.exact.embeddings(use.in_one(inputs), use.cache(whole=True))
        got, exact, scale = (
            each.where(use.is_token[..., None], torch.zeros((), dtype=each.dtype))
            for each in (use.in_one(outputs), token + position, token.abs() + position.abs())
        )
        row, wrong = elementwise("embed + pos_embed", use, got, exact, scale, ADD)
        return row, first_position(wrong)

    def _block(
        self, use: Use, layer: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> tuple[Isolated, int]:
        """Check a block's output at each position, and return the first wrong position, too."""
        part = self.exact.block(layer)
        given, got = use.in_one(inputs).double(), use.in_one(outputs).double()
        exact = part(given, use.cache(whole=True))
        key = (layer, *given.shape, *use.padding)
        before, envelope = self._known.get(key, (torch.inf, given))
        if not bool((rms(given - before) <= NEARLY * rms(given)).all()):
            envelope = self._envelope(part, use, given, exact)
            self._known[key] = given, envelope
        u = UNIT_ROUNDOFF[self.products or self.exact.dtype]
        row, wrong = by_rows(f"blocks.{layer}", use, got, exact, envelope, PART, u, use.is_token)
        return row, first_position(wrong)

    def _envelope(self, part: Part, use: Use, given: Tensor, exact: Tensor) -> Tensor:
        """Return the mean square change [batch pos] of a block's output under random rounding.

        The mean is over d_model and over several random runs.
        """
        n_draws = LONG_DRAWS if use.length > LONG else DRAWS
        envelope = self._changes(part, use, given, exact, n_draws)
        if not use.padding:
            first = (given[:, :FIRST], exact[:, :FIRST], FIRST_DRAWS)
            envelope[:, :FIRST] = self._changes(part, use, *first)
        return envelope

    def _changes(self, part: Part, use: Use, given: Tensor, exact: Tensor, draws: int) -> Tensor:
        """Return the mean square change [batch pos] of `exact` in `draws` randomly rounded runs."""
        copies = replace(use, batch=use.batch * draws, padding=use.padding * draws)
        with RandomRounding(self.exact.dtype, self.products):
            moved = part(given.repeat(draws, 1, 1), copies.cache(whole=True))
        changes = moved.view(draws, *exact.shape) - exact
        return changes.square().mean(dim=(0, -1))

    def _layer_norm(
        self, use: Use, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> tuple[Isolated, int]:
        residual, module = use.in_one(inputs).double(), self.exact.module("ln_final")
        scale = layer_norm_scales(residual, self.exact.cfg.eps)[0]
        if isinstance(module, LayerNorm):
            scale = scale * module.w.abs() + module.b.abs()
        got, exact = use.in_one(outputs), module(residual)
        row, wrong = elementwise("ln_final", use, got, exact, scale, LAYER_NORM)
        return row, first_position(wrong)

    def _logits(
        self, use: Use, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> tuple[Isolated, int]:
        """Check the logits at the first position, the last position and some random positions."""
        x, logits = use.in_one(inputs), use.in_one(outputs)
        n_rows = max(2, ROWS // len(x))
        drawn = torch.randperm(x.shape[1], generator=self.generator)[: n_rows - 2].tolist()
        positions = sorted({0, x.shape[1] - 1, *drawn})
        x, logits = x[:, positions].double(), logits[:, positions]
        u = UNIT_ROUNDOFF[self.products or logits.dtype]

        def of_tokens(tokens: slice) -> tuple[Tensor, Tensor]:
            W_U, b_U = self.exact.unembedding(tokens)

            def terms(size: Size) -> Tensor:
                return size(x) @ size(W_U) + size(b_U)

            exact = terms(lambda each: each)
            return exact, sum_scale(exact, terms, u)

        pairs = zip(*map(of_tokens, self.exact.vocabulary()), strict=True)
        exact, scale = (torch.cat(each, dim=-1) for each in pairs)
        row, wrong = elementwise("unembed", use, logits, exact, scale, LINEAR, x.shape[-1], u)
        return row, positions[first_position(wrong)]
