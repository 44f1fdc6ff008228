"""Beam search: extends several continuations of a prompt at the same time, and keeps the best."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from clean_transformer.text.decoding import Model, Stop, decode_one, prefill
from clean_transformer.text.finite import require_finite
from clean_transformer.text.sampling import Rows, penalize
from clean_transformer.text.settings import Sampling


@dataclass(frozen=True)
class Beam:
    """One continuation of a prompt.

    `new` holds the token ids after the prompt. `total` is the sum of the log-probabilities of these
    tokens, in nats. `mean` is `total` divided by the number of tokens in `new`.
    """

    new: list[int]
    total: float = 0.0
    mean: float = 0.0


@dataclass
class Search:
    """The state of the beam search for one prompt.

    `prompt` holds token ids. `running` holds the beams that can still grow. `ended` holds the
    stopped beams with the highest `mean`, the highest first. `running` and `ended` each have at
    most `width` beams. A beam stops when `stop.ends` returns True for its new tokens, or when it
    has `max_new_tokens` new tokens.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    width: int
    stop: Stop
    running: list[Beam] = field(default_factory=lambda: [Beam([])])
    ended: list[Beam] = field(default_factory=list)

    def advance(self, log_probs: Float[Tensor, "beam d_vocab"]) -> list[int]:
        """Extend the running beams by one token, and keep the `width` most probable new beams.

        `log_probs` has the log-probabilities of the next token, one row for each running beam. New
        beams that stop move to `ended` if they are among the `width` most probable. For each new
        running beam, the result has the index of the old beam that it extends. The result is empty
        when the search is over.
        """
        length = len(self.running[0].new) + 1
        totals = torch.tensor([beam.total for beam in self.running], device=log_probs.device)
        totals = (totals[:, None] + log_probs).flatten()
        # A candidate is a running beam with one more token. For each running beam, at most
        # len(stop.tokens) candidates end in a stop token. So at least `width` of the n_candidates
        # best candidates end in another token.
        n_candidates = max(2, 1 + len(self.stop.tokens)) * self.width
        best, places = totals.topk(min(n_candidates, len(totals)))

        parents: list[int] = []
        running: list[Beam] = []
        candidates = zip(best.tolist(), (best / length).tolist(), places.tolist(), strict=True)
        for rank, (total, mean, place) in enumerate(candidates):
            parent, token = divmod(place, log_probs.shape[-1])
            beam = Beam([*self.running[parent].new, token], total, mean)
            if length == self.max_new_tokens or self.stop.ends(beam.new):
                if rank < self.width:
                    self.ended.append(beam)
            elif len(running) < self.width:
                running.append(beam)
                parents.append(parent)

        self.ended = sorted(self.ended, key=lambda beam: -beam.mean)[: self.width]
        if len(self.ended) == self.width and running and running[0].mean <= self.ended[-1].mean:
            parents, running = [], []
        self.running = running
        return parents


def search_beams(
    model: Model, prompts: Rows, max_new_tokens: int, width: int, sampling: Sampling, stop: Stop
) -> list[list[int]]:
    """Return, for each prompt, the token ids of the best continuation that the search found.

    The best continuation has the highest mean log-probability per token. The search extends `width`
    continuations (beams) per prompt, as transformers does with `length_penalty=1.0` and
    `early_stopping=False`. The penalties in `sampling` change the log-probabilities. The search for
    a prompt is over when `width` beams have ended, and no running beam has a higher mean
    log-probability than the worst ended beam.

    Raises `ValueError` for a `width` below 1, and for a temperature above 0.
    """
    if width < 1 or sampling.temperature:
        raise ValueError(
            f"beams={width} with temperature={sampling.temperature}: there must be 1 beam or more, "
            "and beam search does not draw; use temperature 0"
        )
    searches = [Search(prompt, max_new_tokens, width, stop) for prompt in prompts]
    logits, cache = prefill(model, prompts, max_new_tokens)
    while True:
        # Each row of the batch is one running beam. The beams of the first prompt come first, then
        # the beams of the second prompt, and so on.
        texts = [search.prompt for search in searches for _ in search.running]
        new = [beam.new for search in searches for beam in search.running]
        require_finite(model, logits, texts, new)
        log_probs = penalize(logits.log_softmax(dim=-1), texts, new, sampling)
        rows: list[int] = []
        start = 0
        for search in searches:
            end = start + len(search.running)
            if search.running:
                rows += [start + parent for parent in search.advance(log_probs[start:end])]
            start = end
        if not rows:
            return [search.ended[0].new for search in searches]
        cache.select(torch.tensor(rows, device=model.device))
        tokens = [beam.new[-1] for search in searches for beam in search.running]
        logits = decode_one(model, torch.tensor(tokens, device=model.device), cache)
