"""Decoding: runs the model once on the prompts (prefill), then generates one token at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache
from clean_transformer.support.numerics import at_least_float32
from clean_transformer.text.finite import require_finite
from clean_transformer.text.sampling import Logits, Rows, choose, new_generator, penalize
from clean_transformer.text.settings import Sampling
from clean_transformer.text.tokenizer import Tokenizer


@runtime_checkable
class Model(Protocol):
    """The attributes and methods of a model that can generate text, such as `DemoTransformer`.

    A model may also have an attribute `cache_class`. The function `decode` then creates a KV cache
    of this class instead of `KVCache`.
    """

    cfg: Config

    @property
    def device(self) -> torch.device:
        """The device on which the input tokens of the model must be."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the logits. The arguments are the same as in `DemoTransformer.forward`."""


@dataclass(frozen=True)
class Stop:
    """Says where a generated continuation stops: at one of `tokens`, or at one of `strings`.

    A continuation stops when its last token is in `tokens`, or when its text contains one of
    `strings`. A string may begin and end in the middle of a token. `strings` and the methods `text`
    and `settled_text` need a `tokenizer`, which converts token ids to text. Raises `ValueError` for
    an empty string.
    """

    tokens: Sequence[int] = ()
    strings: Sequence[str] = ()
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        if "" in self.strings:
            raise ValueError("a stop string is empty, and would stop every text; leave it out")

    def ends(self, new: Sequence[int]) -> bool:
        """Whether the continuation `new` stops after its last token. `new` holds token ids.

        Call this method after each new token, because only the last token is compared with
        `tokens`.
        """
        if new[-1] in self.tokens:
            return True
        return bool(self.strings) and any(string in self._decode(new) for string in self.strings)

    def text(self, new: Sequence[int]) -> str:
        """Return the text of the token ids `new`, without the stop string and any text after it.

        If the last token of `new` is in `tokens`, the text of this token is left out, too.
        """
        text = self._decode(new[:-1] if new and new[-1] in self.tokens else new)
        return text[: min((text.find(s) for s in self.strings if s in text), default=len(text))]

    def settled_text(self, new: Sequence[int]) -> str:
        """Return the text of the token ids `new`, without the end that later tokens could change.

        The last bytes are left out if they are an incomplete character. The last characters are
        left out if they may be the beginning of a stop string.
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
    """Run the model on `prompts`. Return the logits for the next tokens, and the filled KV cache.

    The logits have one row for each prompt. They are in float32, or in float64 for a float64 model.
    Shorter prompts are left-padded. The cache is an instance of `cache_class`, and has room for
    `max_new_tokens` more tokens.

    Raises `ValueError`, before the model runs, if the longest prompt and `max_new_tokens` together
    exceed n_ctx, if `max_new_tokens` is below 1, if a prompt is empty, and if there is no prompt.
    """
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; it must be 1 or more, as an int")
    lengths = [len(prompt) for prompt in prompts]
    if not all(lengths) or not lengths:
        raise ValueError("there is nothing to continue: every prompt needs 1 token or more")
    longest, n_ctx = max(lengths), model.cfg.n_ctx
    excess, room = longest + max_new_tokens - n_ctx, n_ctx - longest
    if excess > 0:
        fewer = f", or ask for {room} new tokens or fewer" if room > 0 else ""
        raise ValueError(
            f"{longest} tokens and {max_new_tokens} new ones are more than the n_ctx={n_ctx} "
            f"positions that the model has; shorten the prompt by {excess} tokens{fewer}"
        )
    paddings = [longest - length for length in lengths]
    rows = [[0] * padding + [*prompt] for padding, prompt in zip(paddings, prompts, strict=True)]
    tokens = torch.tensor(rows, device=model.device)
    starts = torch.tensor(paddings, device=model.device)
    is_token = torch.arange(longest, device=model.device) >= starts[:, None]
    attention_mask = is_token.int() if any(paddings) else None
    cache = cache_class(model.cfg.n_layers, longest + max_new_tokens, attention_mask)
    logits = model(tokens, kv_cache=cache, last_only=True)[:, -1]
    return at_least_float32(logits), cache


@torch.no_grad()
def decode_one(model: Model, tokens: Int[Tensor, "batch"], kv_cache: KVCache) -> Logits:
    """Run the model on one new token per row, and return the logits for the next tokens.

    `kv_cache` holds the keys and values of the earlier tokens. The model adds the keys and values
    of the new tokens to `kv_cache`. The logits are in float32, or in float64 for a float64 model.
    """
    return at_least_float32(model(tokens[:, None], kv_cache=kv_cache)[:, -1])


def decode(
    model: Model, prompts: Rows, max_new_tokens: int, sampling: Sampling
) -> Iterator[list[int]]:
    """Generate `max_new_tokens` tokens per prompt, and yield one list per step.

    The list of a step holds one new token id for each prompt, in the order of `prompts`. Raises
    `RuntimeError` if the logits of a prompt are NaN (see `require_finite`).
    """
    generator = new_generator(sampling.seed)
    new: list[list[int]] = [[] for _ in prompts]
    cache_class = getattr(model, "cache_class", KVCache)
    logits, cache = prefill(model, prompts, max_new_tokens, cache_class)
    for step in range(1, max_new_tokens + 1):
        require_finite(model, logits, prompts, new)
        chosen = choose(penalize(logits, prompts, new, sampling), sampling, generator)
        tokens = chosen.tolist()
        yield tokens
        for row, token in zip(new, tokens, strict=True):
            row.append(token)
        if step < max_new_tokens:
            logits = decode_one(model, chosen.to(model.device), cache)


def decode_until(
    model: Model, prompts: Rows, max_new_tokens: int, sampling: Sampling, stop: Stop
) -> list[list[int]]:
    """Return one list of new token ids for each prompt.

    Each list ends with the first token for which `stop.ends` returns True. If there is no such
    token, the list has `max_new_tokens` tokens.
    """
    new: list[list[int]] = [[] for _ in prompts]
    going = [*range(len(prompts))]
    for tokens in decode(model, prompts, max_new_tokens, sampling):
        for row in going:
            new[row].append(tokens[row])
        going = [row for row in going if not stop.ends(new[row])]
        if not going:
            break
    return new
