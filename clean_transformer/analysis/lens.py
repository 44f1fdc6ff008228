"""Computes the logit lens: what a model would predict if it ended after an earlier layer."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from clean_transformer.analysis.prediction import Text, single
from clean_transformer.model import DemoTransformer
from clean_transformer.support.numerics import at_least_float32


@torch.no_grad()
def lens_log_probs(model: DemoTransformer, text: Text) -> Iterator[Float[Tensor, "pos d_vocab"]]:
    """Yield the log-probabilities of the next tokens at one depth after the other.

    The depths are before each block, and after the last block. Raises `ValueError` for several
    texts.
    """
    for stream in _streams(model, text)[0]:
        yield at_least_float32(model.unembed(model.ln_final(stream[None])))[0].log_softmax(dim=-1)


@torch.no_grad()
def logit_lens(
    model: DemoTransformer, text: Text
) -> tuple[Float[Tensor, "component pos d_vocab"], list[str]]:
    """Return the next token's log-probabilities at each depth, and a label for each depth.

    There is one depth before each block, and one depth after the last block. To get the
    log-probabilities at a depth, this function applies ln_final and the unembedding to the residual
    stream at this depth, as if the model ended there (nostalgebraist 2020, "interpreting GPT: the
    logit lens"). The axis "component" of the log-probabilities has one entry per depth. Its last
    entry is the model's own prediction. The labels are "0_pre", "1_pre", …, "final_post", as in
    `ActivationCache.accumulated_resid`. Raises `ValueError` for several texts.
    """
    streams, labels = _streams(model, text)
    return at_least_float32(model.unembed(model.ln_final(streams))).log_softmax(dim=-1), labels


def _streams(
    model: DemoTransformer, text: Text
) -> tuple[Float[Tensor, "component pos d_model"], list[str]]:
    """Return the residual stream at each depth, and the labels of the depths."""
    _, cache = model.run_with_cache(
        single(model, text),
        names_filter=lambda name: name.endswith(("resid_pre", "resid_post")),
        remove_batch_dim=True,
    )
    streams, labels = cache.accumulated_resid(return_labels=True)
    return streams, labels
