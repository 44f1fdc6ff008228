"""The table of uses: how each calls the model, and what it means for a person when it is wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache

Tokens = Int[Tensor, "batch pos"]


@dataclass(frozen=True)
class Use:
    """One way to call the model.

    `batch` is the number of texts, and `reads` are the numbers of tokens that the calls read. With
    `is_cached`, each call reads on after those before it, and only its last logits are asked for.
    `padding` has, for each text, how many positions on its left are padding. `selects` has, by the
    number of a call, the rows with which the batch goes on after it, as in beam search. `means` is
    what a person does: "… is wrong" completes it.
    """

    name: str
    means: str
    batch: int
    reads: tuple[int, ...]
    is_cached: bool = True
    padding: tuple[int, ...] = ()
    selects: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """The number of positions of a text."""
        return sum(self.reads)

    @property
    def case(self) -> str:
        """The use and its size, for reports."""
        return f"{self.name}, {self.batch} × {self.length} tokens"

    @property
    def is_token(self) -> Bool[Tensor, "batch pos"]:
        """Which positions hold tokens; of batch 1 if all do."""
        padding = torch.tensor(self.padding or (0,))
        return torch.arange(self.length) >= padding[:, None]

    def cache(self, cache_class: type[KVCache] = KVCache, *, whole: bool = False) -> KVCache | None:
        """An empty cache of one layer, or None for a use without a cache.

        It knows the padding of the first call; with `whole`, of all positions in one call.
        """
        if not self.is_cached:
            return None
        mask = self.is_token.int() if self.padding else None
        if mask is not None and not whole:
            mask = mask[:, : self.reads[0]]
        return cache_class(1, self.length, mask)

    def calls(self, cfg: Config) -> list[Tokens]:
        """The ids that each call reads.

        They are spread over the vocabulary. Id 0 and the last id (<|endoftext|> in GPT-2) are among
        them, the latter in the middle, too.
        """
        ids = torch.arange(self.batch * self.length) * 7919 % cfg.d_vocab
        ids[0] = ids[len(ids) // 2] = cfg.d_vocab - 1
        ids[-1] = 0
        calls, rows = [], torch.arange(self.batch)
        texts = ids.reshape(self.batch, -1)
        for number, call in enumerate(torch.split(texts, [*self.reads], dim=1)):
            calls.append(call[rows])
            if number in self.selects:
                rows = rows[list(self.selects[number])]
        return calls

    def in_one(self, calls: Sequence[Tensor]) -> Tensor:
        """The calls side by side on the CPU, for the rows with which the batch ends."""
        so_far: list[Tensor] = []
        for number, call in enumerate(calls):
            so_far.append(call.cpu())
            if number in self.selects:
                so_far = [each[list(self.selects[number])] for each in so_far]
        return torch.cat(so_far, dim=1)


def uses(cfg: Config) -> list[Use]:
    """The uses that call the model in different ways, in lengths that this model allows."""
    n_ctx = cfg.n_ctx
    prompt = min(20, max(1, n_ctx - 3))
    return [
        Use("forward", "reading short texts", 2, (min(33, n_ctx),), is_cached=False),
        Use("long text", f"reading texts of {n_ctx} tokens", 1, (n_ctx,), is_cached=False),
        Use("generate", "generating text", 1, steps(n_ctx, (1, 64, 700, n_ctx - 1))),
        Use("generate", "generating several texts at once", 4, steps(min(n_ctx, 66), (1, 64))),
        Use(
            "unequal batch",
            "reading texts of unequal length in one batch",
            3,
            steps(min(n_ctx, prompt + 2), (prompt, prompt + 1)),
            padding=(0, prompt // 4, prompt - 1),
        ),
        Use(
            "beams",
            "beam search",
            2,
            steps(min(n_ctx, prompt + 3), (prompt, prompt + 1, prompt + 2)),
            selects={0: (1, 1, 0), 1: (2, 0, 1)} if n_ctx > 2 else {},
        ),
    ]


def steps(length: int, positions: Sequence[int]) -> tuple[int, ...]:
    """How many tokens each call reads so that one token is read after each of `positions` tokens.

    One call reads all that stands between two of them. There are at most `length` tokens.
    """
    reads: list[int] = []
    for position in sorted({p for p in positions if 0 < p < length}):
        if position > sum(reads):
            reads.append(position - sum(reads))
        reads.append(1)
    return tuple(reads) or (length,)
