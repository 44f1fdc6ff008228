"""Token after token: read the prompts once, then one token at a time, until something ends it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache
from clean_transformer.text.sampling import Logits, Rows, Sampling
from clean_transformer.text.tokenizer import Tokenizer


@runtime_checkable
class Model(Protocol):
    """What can be generated from: called with tokens, `kv_cache` and `last_only`, gives logits."""

    cfg: Config

    @property
    def device(self) -> torch.device:
        """Where its tokens belong."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `DemoTransformer.forward`."""


@dataclass(frozen=True)
class Stop:
    """What ends a continuation: one of these tokens, or one of these strings in its text.

    A string may begin and end within tokens; it takes a `tokenizer` to see it.
    """

    tokens: Sequence[int] = ()
    strings: Sequence[str] = ()
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        if "" in self.strings:
            raise ValueError("a stop string is empty, which every text has; leave it out")

    def ends(self, new: Sequence[int]) -> bool:
        """Whether these tokens, of which only the last is untested, are the whole continuation."""
        if new[-1] in self.tokens:
            return True
        return bool(self.strings) and any(string in self._decode(new) for string in self.strings)

    def text(self, new: Sequence[int]) -> str:
        """The text of a continuation, without what ended it."""
        text = self._decode(new[:-1] if new and new[-1] in self.tokens else new)
        return text[: min((text.find(s) for s in self.strings if s in text), default=len(text))]

    def settled_text(self, new: Sequence[int]) -> str:
        """The text so far that no further token can change.

        Without the bytes of an unfinished character, and without what may begin a stop string.
        """
        text = self._decode(new).rstrip("\N{REPLACEMENT CHARACTER}")
        begun = (
            length
            for string in self.strings
            for length in range(1, len(string))
            if text.endswith(string[:length])
        )
        return text[: len(text) - max(begun, default=0)]

    def _decode(self, tokens: Sequence[int]) -> str:
        assert self.tokenizer is not None
        return str(self.tokenizer.to_string(tokens))


@torch.no_grad()
def prefill(
    model: Model, prompts: Rows, max_new_tokens: int, cache_class: type[KVCache] = KVCache
) -> tuple[Logits, KVCache]:
    """Read the prompts, padded on the left; the logits of what follows them, in float32.

    The cache, of that class, has room for as many new tokens. Raises `ValueError` if the model has
    not, and for none at all, before any work.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
    lengths = [len(prompt) for prompt in prompts]
    if not all(lengths) or not lengths:
        raise ValueError("there is nothing to continue: every prompt must have a token or more")
    longest, n_ctx = max(lengths), model.cfg.n_ctx
    if longest + max_new_tokens > n_ctx:
        raise ValueError(
            f"{longest} tokens and {max_new_tokens} new ones are more than the n_ctx={n_ctx} "
            f"positions that the model has; shorten the prompt, or ask for {n_ctx - longest}"
        )
    paddings = [longest - length for length in lengths]
    rows = [[0] * padding + [*prompt] for padding, prompt in zip(paddings, prompts, strict=True)]
    tokens = torch.tensor(rows, device=model.device)
    is_token = torch.arange(longest) >= torch.tensor(paddings)[:, None]
    attention_mask = is_token.int().to(model.device) if any(paddings) else None
    cache = cache_class(model.cfg.n_layers, longest + max_new_tokens, attention_mask)
    return model(tokens, kv_cache=cache, last_only=True)[:, -1].float(), cache


@torch.no_grad()
def decode_one(model: Model, tokens: Int[Tensor, "batch"], kv_cache: KVCache) -> Logits:
    """Read one more token of each input; the logits of what follows it, in float32."""
    return model(tokens[:, None], kv_cache=kv_cache)[:, -1].float()


def decode(
    model: Model, prompts: Rows, max_new_tokens: int, sampling: Sampling
) -> Iterator[list[int]]:
    """The next token of every prompt, step by step."""
    generator = sampling.generator()
    new: list[list[int]] = [[] for _ in prompts]
    cache_class = getattr(model, "cache_class", KVCache)
    logits, cache = prefill(model, prompts, max_new_tokens, cache_class)
    for step in range(1, max_new_tokens + 1):
        chosen = sampling.choose(sampling.penalize(logits, prompts, new), generator)
        tokens = chosen.tolist()
        yield tokens
        for row, token in zip(new, tokens, strict=True):
            row.append(token)
        if step < max_new_tokens:
            logits = decode_one(model, chosen.to(model.device), cache)


def decode_until(
    model: Model, prompts: Rows, max_new_tokens: int, sampling: Sampling, stop: Stop
) -> list[list[int]]:
    """The new tokens of every prompt, to the one that ends it."""
    new: list[list[int]] = [[] for _ in prompts]
    going = [*range(len(prompts))]
    for tokens in decode(model, prompts, max_new_tokens, sampling):
        for row in going:
            new[row].append(tokens[row])
        going = [row for row in going if not stop.ends(new[row])]
        if not going:
            break
    return new
