"""Pure functions from logits to the next token: penalties, filters, and the random draw."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clean_transformer.text.settings import Sampling

Logits = Float[Tensor, "batch d_vocab"]


# The token ids of each row of a batch. Rows need not be equally long.
Rows = Sequence[Sequence[int]]


def penalize_repetition(logits: Logits, previous: Rows, penalty: float) -> Logits:
    """Make each token in `previous` less likely, no matter how often it occurs there.

    Positive logits are divided by `penalty`, and negative logits are multiplied by it (Keskar et
    al. 2019, "CTRL", section 4.1, in the form that transformers uses).
    """
    logits = logits.clone()
    for row, ids in zip(logits, previous, strict=True):
        seen = torch.unique(torch.tensor(ids, dtype=torch.int64, device=row.device))
        row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return logits


def penalize_frequency(logits: Logits, previous: Rows, penalty: float) -> Logits:
    """Subtract `penalty` from a token's logit once for each time that it occurs in `previous`.

    This is the formula of OpenAI's API and of vLLM. Both count only generated tokens, not the
    prompt.
    """
    logits = logits.clone()
    for row, ids in zip(logits, previous, strict=True):
        used = torch.tensor(ids, dtype=torch.int64, device=row.device)
        seen, counts = torch.unique(used, return_counts=True)
        row[seen] -= penalty * counts
    return logits


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Keep the `k` most likely tokens, and ties with the k-th; set the other logits to −inf."""
    kth = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Logits, p: float) -> Logits:
    """Keep the most likely tokens until their probabilities sum to `p`; set other logits to −inf.

    This is nucleus sampling (Holtzman et al. 2020, section 3.1).
    """
    ascending, ids = logits.sort()
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    removed[:, -1] = False  # rounding of the sum must not remove the most likely token
    return logits.masked_fill(removed.scatter(-1, ids, removed), -math.inf)


def keep_min_p(logits: Logits, p: float) -> Logits:
    """Keep tokens at least `p` times as likely as the most likely token; set other logits to −inf.

    This is min-p sampling (Nguyen et al. 2024).
    """
    probabilities = logits.softmax(dim=-1)
    least = p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -math.inf)


def sample(logits: Logits, generator: torch.Generator | None = None) -> Int[Tensor, "batch"]:
    """Draw one token per row, with the probabilities softmax(logits).

    The draw runs on the CPU, so that a seed gives the same tokens on every device.
    """
    return logits.softmax(dim=-1).cpu().multinomial(1, generator=generator).squeeze(-1)


def new_generator(seed: int | None) -> torch.Generator | None:
    """Return a generator with this seed. None stands for PyTorch's global generator."""
    return None if seed is None else torch.Generator().manual_seed(seed)


def penalize(logits: Logits, prompts: Rows, new: Rows, sampling: Sampling) -> Logits:
    """Return the logits after both penalties. `new` holds the tokens generated so far.

    Unlike in transformers, padding tokens do not count as repeated text.
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
    """Return the next token of each row. The penalties are already in the `logits`."""
    if not sampling.temperature:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return sample(logits, generator)
