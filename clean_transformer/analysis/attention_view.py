"""Shows attention patterns in a notebook: choose a head, point at a token to see what it reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from clean_transformer.activation_cache import ActivationCache
from clean_transformer.reports.page import framed, render_page
from clean_transformer.support.files import write_atomically
from clean_transformer.text.tokenizer import visible


@dataclass(frozen=True)
class AttentionView:
    """Attention patterns of one text. In a notebook, you can choose heads and point at tokens.

    `tokens` has the tokens of the text as strings. `patterns[layer][head]` has the attention
    weights of a head, in thousandths, as `triangle` lists them.
    """

    tokens: list[str]
    patterns: list[list[list[int]]]

    def __repr__(self) -> str:
        layers, heads = len(self.patterns), len(self.patterns[0])
        return f"AttentionView({len(self.tokens)} tokens, {layers} layers of {heads} heads)"

    def _repr_html_(self) -> str:
        return framed(self.render())

    def render(self) -> str:
        """Return the view as an HTML page."""
        ids = [*range(len(self.tokens))]
        labels = dict(zip(ids, map(visible, self.tokens), strict=True))
        return render_page("attention.html.jinja", ids=ids, labels=labels, **vars(self))

    def save(self, file: str | Path) -> None:
        """Write the view to `file` as an HTML page. If an error occurs, `file` is unchanged."""
        write_atomically(Path(file), self.render())


def attention_view(cache: ActivationCache, tokens: Sequence[str]) -> AttentionView:
    """Return a view of all heads, for a notebook.

    `cache` holds the activations of one text, and `tokens` has the tokens of this text as strings:
    `model.to_str_tokens(text)`. Raises `KeyError` if the cache lacks the pattern of a layer. Raises
    `ValueError` if the cache holds several texts, or if `tokens` does not have
    one token per position.
    """
    patterns = []
    for layer in range(cache.n_layers):
        pattern = cache["pattern", layer, "attn"]
        if pattern.ndim == 4:
            if len(pattern) != 1:
                raise ValueError(f"the cache is of {len(pattern)} texts; run the model on one text")
            pattern = pattern[0]
        if pattern.shape[-1] != len(tokens):
            raise ValueError(
                f"{len(tokens)} tokens for {pattern.shape[-1]} positions; "
                "give model.to_str_tokens of the text that the model read"
            )
        patterns.append(triangle(pattern))
    return AttentionView([*tokens], patterns)


def triangle(pattern: Float[Tensor, "head query key"]) -> list[list[int]]:
    """Return the attention weights of each head, multiplied by 1000 and rounded, as one list.

    The list has the one weight of query 0, then the two weights of query 1, and so on.
    """
    query, key = torch.tril_indices(pattern.shape[1], pattern.shape[2])
    return (1000 * pattern.detach().cpu()[:, query, key].float()).round().int().tolist()
