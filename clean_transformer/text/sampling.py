"""From logits to the next token: pure functions, and `Sampling`, the settings that combine them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.support.validation import require

Logits = Float[Tensor, "batch d_vocab"]


# The token ids of each row of a batch. Rows need not be equally long.
Rows = Sequence[Sequence[int]]


def penalize_repetition(logits: Logits, previous: Rows, penalty: float) -> Logits:
    """Make each token that occurred before less likely, however often it occurred.

    Positive logits are divided by `penalty` and negative ones multiplied (Keskar et al. 2019,
    "CTRL", section 4.1, in the form that transformers uses).
    """
    logits = logits.clone()
    for row, ids in zip(logits, previous, strict=True):
        seen = torch.unique(torch.tensor(ids, dtype=torch.int64, device=row.device))
        row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return logits


def penalize_frequency(logits: Logits, previous: Rows, penalty: float) -> Logits:
    """Subtract `penalty` from a token's logit for each time that it occurred before.

    This is the formula of OpenAI's API and of vLLM. They count only generated tokens, without the
    prompt.
    """
    logits = logits.clone()
    for row, ids in zip(logits, previous, strict=True):
        used = torch.tensor(ids, dtype=torch.int64, device=row.device)
        seen, counts = torch.unique(used, return_counts=True)
        row[seen] -= penalty * counts
    return logits


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Keep the `k` most likely tokens, and ties with the k-th; set the others to −inf."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Logits, p: float) -> Logits:
    """Keep the fewest tokens whose probabilities add up to `p` or more; set the others to −inf.

    This is nucleus sampling (Holtzman et al. 2020, section 3.1).
    """
    ascending, ids = logits.sort()
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    removed[:, -1] = False  # rounding of the sum must not remove the most likely token
    return logits.masked_fill(removed.scatter(-1, ids, removed), -math.inf)


def keep_min_p(logits: Logits, p: float) -> Logits:
    """Keep tokens at least `p` times as likely as the most likely one; set the others to −inf.

    This is min-p sampling (Nguyen et al. 2024).
    """
    probabilities = logits.softmax(dim=-1)
    least = p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -math.inf)


def sample(logits: Logits, generator: torch.Generator | None = None) -> Int[Tensor, "batch"]:
    """Draw a token from the softmax of each row.

    The CPU draws, so that a seed gives the same tokens on every device.
    """
    return logits.softmax(dim=-1).cpu().multinomial(1, generator=generator).squeeze(-1)


class SamplingSettings(TypedDict, total=False):
    """The fields of `Sampling`, as keyword arguments of a function."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    frequency_penalty: float
    seed: int | None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    | field | meaning |
    |---|---|
    | `temperature` | 0 takes the most likely token. Otherwise logits are divided by it |
    | `top_k` | draw from the k most likely tokens |
    | `top_p` | draw from the fewest tokens whose probabilities add up to this |
    | `min_p` | draw from tokens at least this likely, relative to the most likely one |
    | `repetition_penalty` | above 1, tokens of the prompt and after it become less likely |
    | `frequency_penalty` | above 0, generated tokens become less likely each time they occur |
    | `seed` | of the draws; without it, they come from PyTorch's global generator |

    The penalties come first, then the temperature, `top_k`, `top_p` and `min_p`, which is the order
    of transformers. Raises `ValueError`, naming the field, for an impossible value.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        finite = math.isfinite
        for field, holds, wanted in (
            ("temperature", lambda t: finite(t) and t >= 0, "0 or a positive number"),
            ("top_k", lambda k: isinstance(k, int) and k > 0, "a positive integer"),
            ("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
            ("min_p", lambda p: 0 <= p <= 1, "from 0 to 1"),
            ("repetition_penalty", lambda x: finite(x) and x > 0, "a positive number"),
            ("frequency_penalty", finite, "a finite number"),
        ):
            value = getattr(self, field)
            require(self, field, value is None or holds(value), wanted)
        for field in ("top_k", "top_p", "min_p"):
            require(
                self,
                field,
                self.temperature > 0 or getattr(self, field) is None,
                "None at temperature 0, which takes the most likely token; set a temperature too, "
                "such as 1.0",
            )

    def generator(self) -> torch.Generator | None:
        """Return a new generator with the seed, or None for PyTorch's global generator."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def penalize(self, logits: Logits, prompts: Rows, new: Rows) -> Logits:
        """Return the logits after both penalties, given each prompt and its generated tokens.

        Unlike in transformers, padding tokens do not count as repeated text.
        """
        if self.repetition_penalty != 1:
            so_far = [[*prompt, *added] for prompt, added in zip(prompts, new, strict=True)]
            logits = penalize_repetition(logits, so_far, self.repetition_penalty)
        if self.frequency_penalty:
            logits = penalize_frequency(logits, new, self.frequency_penalty)
        return logits

    def choose(self, logits: Logits, generator: torch.Generator | None) -> Int[Tensor, "batch"]:
        """Return the next token of each row of penalized logits."""
        if not self.temperature:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return sample(logits, generator)
