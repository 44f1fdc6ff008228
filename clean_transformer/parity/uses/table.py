"""Lists the uses that are checked: ways to call the model, such as generating text."""

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
    """One way to call the model, such as generating text.

    `name` is the short name for reports. `means` says what a person does in this use, such as
    "generating text". `batch` is the number of texts. The model is called `len(reads)` times: call
    number i (from 0 on) reads the next `reads[i]` tokens of each text.

    If `is_cached` is True, the calls share a KV cache, and only the logits at the last position of
    each call are checked. `padding` has the number of padding positions on the left of each text,
    and is empty if no text is padded.

    `selects` says how beam search changes the batch between two calls. After call number i, the
    batch consists of the texts with the indices `selects[i]`, in this order. An index can occur
    several times. If i is not a key of `selects`, the batch stays the same.
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
        """The number of positions of each text, including its padding."""
        return sum(self.reads)

    @property
    def case(self) -> str:
        """The name, batch size and length of the use, such as "forward, 2 × 33 tokens"."""
        return f"{self.name}, {self.batch} × {self.length} tokens"

    @property
    def is_token(self) -> Bool[Tensor, "batch pos"]:
        """A mask that is True for tokens and False for padding.

        If no text is padded, the mask has batch size 1.
        """
        padding = torch.tensor(self.padding or (0,))
        return torch.arange(self.length) >= padding[:, None]

    def cache(self, cache_class: type[KVCache] = KVCache, *, whole: bool = False) -> KVCache | None:
        """Return an empty KV cache with one layer, or None if the use has no cache.

        By default, the cache is for all calls of this use. If `whole` is True, the cache is for a
        single call that reads all positions. The two caches differ only in the padding mask, which
        is as long as the text that the first call reads.
        """
        if not self.is_cached:
            return None
        mask = self.is_token.int() if self.padding else None
        if mask is not None and not whole:
            mask = mask[:, : self.reads[0]]
        return cache_class(1, self.length, mask)

    def calls(self, cfg: Config) -> list[Tokens]:
        """Return the token ids [batch pos] that each call of the model reads.

        The ids are spread over the vocabulary. They include the first id of the vocabulary, 0, and
        the last id, which is <|endoftext|> in GPT-2.
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
        """Concatenate the tensors of all calls along the position axis, on the CPU.

        `calls` has one tensor [batch pos …] for each call. The result has the texts that remain
        after the last call. If `selects` copies, drops or reorders texts after a call, the tensors
        of this call and of all earlier calls are indexed in the same way.
        """
        so_far: list[Tensor] = []
        for number, call in enumerate(calls):
            so_far.append(call.cpu())
            if number in self.selects:
                so_far = [each[list(self.selects[number])] for each in so_far]
        return torch.cat(so_far, dim=1) if len(so_far) > 1 else so_far[0]


def uses(cfg: Config) -> list[Use]:
    """Return all uses (ways to call the model) except training and sampling.

    Their texts have at most `n_ctx` tokens.
    """
    n_ctx = cfg.n_ctx
    prompt = min(20, max(1, n_ctx - 3))
    return [
        Use("forward", "reading short texts", 2, (min(33, n_ctx),), is_cached=False),
        Use("long text", f"reading texts of {n_ctx} tokens", 1, (n_ctx,), is_cached=False),
        Use("generate", "generating text", 1, steps(n_ctx, (1, 20, 64, 700, n_ctx - 1))),
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
    """Return how many tokens each call reads, if the model reads `length` tokens in several calls.

    For each p in `positions`, one call reads only the token at position p. If there are unread
    tokens before position p, another call reads all of them first. For example, positions (1, 64)
    give (1, 1, 62, 1). Positions outside 1 … `length` − 1 are ignored. If all positions are
    ignored, a single call reads all `length` tokens.
    """
    reads: list[int] = []
    for position in sorted({p for p in positions if 0 < p < length}):
        if position > sum(reads):
            reads.append(position - sum(reads))
        reads.append(1)
    return tuple(reads) or (length,)
