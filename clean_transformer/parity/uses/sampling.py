"""Checks every operation that text generation calls outside the model, such as top-k and softmax.

The model does not run: `GivenLogits` replaces it.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clean_transformer.config import Config
from clean_transformer.kv_cache import KVCache
from clean_transformer.parity.operations.check import OperationsReport, check_operations
from clean_transformer.text.beam_search import search_beams
from clean_transformer.text.decoding import Stop, decode_until
from clean_transformer.text.settings import Sampling

# Sampling settings. Together they make generation call every function of `text/sampling.py`. The
# keys are the names of the settings in the report.
SETTINGS = {
    "the likeliest token": Sampling(),
    "drawn, filtered": Sampling(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, seed=0),
    "penalized": Sampling(repetition_penalty=1.2, frequency_penalty=0.5),
}


class GivenLogits:
    """A replacement for the model in text generation, which returns given logits.

    `logits` [row d_vocab] are on the device under test. Each call returns one of these
    rows for each text of the batch.
    """

    def __init__(self, cfg: Config, logits: Tensor):
        self.cfg, self.logits, self.device = cfg, logits, logits.device

    def __call__(self, tokens: Tensor, kv_cache: KVCache, last_only: bool = False) -> Tensor:
        """Return logits [batch 1 d_vocab], and advance `kv_cache` by the number of new tokens.

        The text with index i gets the row with index (i + length of the cache before the call)
        modulo the number of rows.
        """
        rows = (torch.arange(len(tokens)) + kv_cache.length) % len(self.logits)
        kv_cache.advance(tokens.shape[1])
        return self.logits[rows.to(self.device)][:, None]


def check_sampling(cfg: Config, logits: Tensor) -> list[tuple[str, OperationsReport]]:
    """Generate text from `logits` [row d_vocab], and check every operation that generation calls.

    Returns a pair (name, report) for each sampling setting in `SETTINGS`, and one for beam search.
    """
    # Generation needs up to 8 positions here. The real model can have fewer, but it does not run.
    model = GivenLogits(replace(cfg, n_ctx=8), logits)
    n_new = 3
    prompts = [[cfg.d_vocab - 1, 0], [cfg.d_vocab // 2]]
    runs: list[tuple[str, Any, tuple[Any, ...]]] = [
        (name, decode_until, (model, prompts, n_new, settings, Stop()))
        for name, settings in SETTINGS.items()
    ]
    runs.append(("beams", search_beams, (model, prompts, n_new, 2, Sampling(), Stop())))
    return [(name, check_operations(function, *given)) for name, function, given in runs]
