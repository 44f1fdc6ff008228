"""Every operation that generation calls besides the model, on logits as wide as the vocabulary."""

from typing import Any

import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache
from clean_transformer.parity.operations.check import OperationsReport, check_operations
from clean_transformer.text.beam_search import search_beams
from clean_transformer.text.decoding import Stop, decode_until
from clean_transformer.text.settings import Sampling

# Settings that call every step of `text/sampling.py`, by what they do.
SETTINGS = {
    "the likeliest token": Sampling(),
    "drawn, filtered": Sampling(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, seed=0),
    "penalized": Sampling(repetition_penalty=1.2, frequency_penalty=0.5),
}


class GivenLogits:
    """Stands in for the model, so that generation runs and only its own operations are called.

    Each call gives rows of `logits` [row d_vocab], which are on the device under test.
    """

    def __init__(self, cfg: Config, logits: Tensor):
        self.cfg, self.logits, self.device = cfg, logits, logits.device

    def __call__(self, tokens: Tensor, kv_cache: KVCache, last_only: bool = False) -> Tensor:
        """Logits [batch 1 d_vocab], of other rows in each call."""
        rows = (torch.arange(len(tokens)) + kv_cache.length) % len(self.logits)
        kv_cache.advance(tokens.shape[1])
        return self.logits[rows.to(self.device)][:, None]


def check_sampling(cfg: Config, logits: Tensor) -> list[tuple[str, OperationsReport]]:
    """A report for each of `SETTINGS` and for beam search, on these logits [row d_vocab]."""
    model = GivenLogits(cfg, logits)
    n_new = min(3, cfg.n_ctx - 2)
    prompts = [[cfg.d_vocab - 1, 0], [cfg.d_vocab // 2]]
    runs: list[tuple[str, Any, tuple[Any, ...]]] = [
        (name, decode_until, (model, prompts, n_new, settings, Stop()))
        for name, settings in SETTINGS.items()
    ]
    runs.append(("beams", search_beams, (model, prompts, n_new, 2, Sampling(), Stop())))
    return [(name, check_operations(function, *given)) for name, function, given in runs]
