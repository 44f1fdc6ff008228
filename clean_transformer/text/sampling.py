"""From logits to the next token: pure functions, and the settings that combine them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.text.settings import SamplingSettings

Logits = Float[Tensor, "batch d_vocab"]


# Token ids of each input of a batch, which need not be equally long.
Rows = Sequence[Sequence[int]]


def penalize_repetition(logits: Logits, previous: Rows, penalty: float) -> Logits:
    """Make each token that occurred before less likely, however often it did.

    Positive logits are divided by `penalty` and negative ones multiplied (Keskar et al. 2019,
    "CTRL", section 4.1, in the form of transformers).
    """
    logits = logits.clone()
    for row, ids in zip(logits, previous, strict=True):
        seen = torch.unique(torch.tensor(ids, dtype=torch.int64, device=row.device))
        row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return logits


def penalize_frequency(logits: Logits, previous: Rows, penalty: float) -> Logits:
    """Subtract `penalty` from a token's logit for each time that it occurred before.

    The formula of OpenAI's API and of vLLM, who count what was generated, without the prompt.
    """
    logits = logits.clone()
    for row, ids in zip(logits, previous, strict=True):
        used = torch.tensor(ids, dtype=torch.int64, device=row.device)
        seen, counts = torch.unique(used, return_counts=True)
        row[seen] -= penalty * counts
    return logits


def keep_top_k(logits: Logits, k: int) -> Logits:
    """−inf for all but the `k` most likely tokens and those as likely as the k-th."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Logits, p: float) -> Logits:
    """−inf for all but the fewest likely tokens that together reach probability `p`.

    Nucleus sampling (Holtzman et al. 2020, section 3.1).
    """
    ascending, ids = logits.sort()
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    removed[:, -1] = False  # the most likely one stays, whatever rounding makes of the sum
    return logits.masked_fill(removed.scatter(-1, ids, removed), -math.inf)


def keep_min_p(logits: Logits, p: float) -> Logits:
    """−inf for each token less than `p` times as likely as the most likely (Nguyen et al. 2024)."""
    probabilities = logits.softmax(dim=-1)
    least = p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -math.inf)


def sample(logits: Logits, generator: torch.Generator | None = None) -> Int[Tensor, "batch"]:
    """Draw a token of each row's softmax, on the CPU: a seed means the same on every device."""
    return logits.softmax(dim=-1).cpu().multinomial(1, generator=generator).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingSettings):
    """How the next token is chosen.

    At `temperature` 0 it is the most likely one. Above, it is drawn: logits are divided by the
    temperature, then only `top_k`, then `top_p`, then `min_p` are kept, in transformers' order.
    The penalties, off at 1 and 0, come first: on the tokens of the prompt and after it for
    `repetition_penalty`, on those after it for `frequency_penalty`. Without a `seed`, draws come
    from PyTorch's own generator.

    Raises `ValueError`, naming the setting, for one that has no meaning.
    """

    def generator(self) -> torch.Generator | None:
        """The source of the draws, at its start."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)

    def penalize(self, logits: Logits, prompts: Rows, new: Rows) -> Logits:
        """The logits after both penalties, given each prompt and what was generated after it.

        In a batch, transformers takes the padding for text that occurred; here it is nothing.
        """
        if self.repetition_penalty != 1:
            so_far = [[*prompt, *added] for prompt, added in zip(prompts, new, strict=True)]
            logits = penalize_repetition(logits, so_far, self.repetition_penalty)
        if self.frequency_penalty:
            logits = penalize_frequency(logits, new, self.frequency_penalty)
        return logits

    def choose(self, logits: Logits, generator: torch.Generator | None) -> Int[Tensor, "batch"]:
        """The next token of each row of penalized logits."""
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
