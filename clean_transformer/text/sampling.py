"""Pure functions that choose the next token from logits: penalties, filters, and random draws."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.text.settings import Sampling

Logits = Float[Tensor, "batch d_vocab"]


# One sequence of token ids for each row of a batch. The sequences may differ in length.
Rows = Sequence[Sequence[int]]


def penalize_repetition(logits: Logits, previous: Rows, penalty: float) -> Logits:
    """Return a copy of `logits` with lower logits for the tokens that occur in `previous`.

    `previous` has one sequence of token ids for each row of `logits`. As in transformers, a
    positive logit of such a token is divided by `penalty`, and a negative logit is multiplied by
    `penalty`. The number of times that the token occurs does not matter. Source: Keskar et al.
    2019, "CTRL", section 4.1.
    """
    logits = logits.clone()
    for row, ids in zip(logits, previous, strict=True):
        seen = torch.unique(torch.tensor(ids, dtype=torch.int64, device=row.device))
        row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return logits


def penalize_frequency(logits: Logits, previous: Rows, penalty: float) -> Logits:
    """Subtract `penalty` × n from the logit of each token that occurs n times in `previous`.

    `previous` has one sequence of token ids for each row of `logits`. The result is a new tensor.
    OpenAI's API and vLLM use the same formula.
    """
    logits = logits.clone()
    for row, ids in zip(logits, previous, strict=True):
        used = torch.tensor(ids, dtype=torch.int64, device=row.device)
        seen, counts = torch.unique(used, return_counts=True)
        row[seen] -= penalty * counts
    return logits


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Keep the logits of the `k` most likely tokens of each row, and set the others to −inf.

    Tokens that are exactly as likely as the k-th token are kept, too.
    """
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Logits, p: float) -> Logits:
    """Keep the most likely tokens of each row, until their probabilities sum to at least `p`.

    The logits of the other tokens become −inf. This is nucleus sampling (Holtzman et al. 2020,
    section 3.1).
    """
    ascending, ids = logits.sort()
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    removed[:, -1] = False  # a rounding error in the sum must not remove the most likely token
    return logits.masked_fill(removed.scatter(-1, ids, removed), -math.inf)


def keep_min_p(logits: Logits, p: float) -> Logits:
    """Keep the tokens of each row that are at least `p` × as likely as the most likely token.

    The logits of the other tokens become −inf. This is min-p sampling (Nguyen et al. 2024).
    """
    probabilities = logits.softmax(dim=-1)
    least = p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -math.inf)


def sample(logits: Logits, generator: torch.Generator | None = None) -> Int[Tensor, "batch"]:
    """Return one token per row, drawn at random with the probabilities softmax(logits).

    The random numbers are drawn on the CPU, so that a seed gives the same numbers for every device.
    The result is on the CPU, too.
    """
    return logits.softmax(dim=-1).cpu().multinomial(1, generator=generator).squeeze(-1)


def new_generator(seed: int | None) -> torch.Generator | None:
    """Return a CPU generator with this seed.

    If `seed` is None, the result is None. `sample` then uses PyTorch's global generator.
    """
    return None if seed is None else torch.Generator().manual_seed(seed)


def penalize(logits: Logits, prompts: Rows, new: Rows, sampling: Sampling) -> Logits:
    """Return `logits` with the repetition penalty and the frequency penalty of `sampling`.

    For each row of `logits`, `prompts` holds the prompt without padding, and `new` holds the tokens
    generated so far. The repetition penalty applies to tokens that occur in the prompt or in `new`,
    and the frequency penalty to tokens that occur in `new`. Unlike in transformers, padding does
    not count as repeated text.
    """
    if sampling.repetition_penalty != 1:
        so_far = [[*prompt, *added] for prompt, added in zip(prompts, new, strict=True)]
        logits = penalize_repetition(logits, so_far, sampling.repetition_penalty)
    if sampling.frequency_penalty:
        logits = penalize_frequency(logits, new, sampling.frequency_penalty)
    return logits


def choose(
    logits: Logits, sampling: Sampling, generator: torch.Generator | None
) -> Int[Tensor, "batch"]:
    """Return the next token id of each row. `logits` must already include the penalties."""
    if not sampling.temperature:
        return logits.argmax(dim=-1)
    # After the subtraction, the largest logit is 0. Even for the smallest temperature, the division
    # then gives 0 for the largest logit and at worst −inf for the others.
    smallest = torch.finfo(logits.dtype).tiny
    logits = logits - logits.amax(dim=-1, keepdim=True)
    logits = logits / max(sampling.temperature, smallest)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return sample(logits, generator)
