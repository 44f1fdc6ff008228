"""`attention_view`: shows a model's attention patterns for one text in a Jupyter notebook."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clean_transformer.activation_cache import ActivationCache
from clean_transformer.analysis.one_text import of_one_text
from clean_transformer.analysis.packing import pack, triangle
from clean_transformer.reports.page import framed, render_page
from clean_transformer.support.files import write_atomically
from clean_transformer.text.symbols import visible


@dataclass(frozen=True)
class AttentionView:
    """A view of the attention patterns of one text. A notebook shows the view as an HTML page.

    On this page, you choose a head, and point at a token to see which tokens the head attends to
    from there. `tokens` has the tokens of the text as strings. `patterns[layer][head]` has the
    attention weights of a head, in thousandths, as a packed string (see `packing`).
    """

    tokens: list[str]
    patterns: list[list[str]]

    def __repr__(self) -> str:
        layers, heads = len(self.patterns), len(self.patterns[0])
        return f"AttentionView({len(self.tokens)} tokens, {layers} layers of {heads} heads)"

    def _repr_html_(self) -> str:
        return framed(self.render())

    def render(self) -> str:
        """Return the view as an HTML page."""
        ids = [*range(len(self.tokens))]
        labels = dict(zip(ids, map(visible, self.tokens), strict=True))
        return render_page("attention.html.jinja", ids=ids, labels=labels, step=1, **vars(self))

    def save(self, file: str | Path) -> None:
        """Write the view to `file` as an HTML page. If an error occurs, `file` does not change."""
        write_atomically(Path(file), self.render())


def attention_view(cache: ActivationCache, tokens: Sequence[str]) -> AttentionView:
    """Return a view of the attention patterns of all heads, for a notebook.

    `cache` holds the activations of one text. `tokens` has the tokens of this text as strings, as
    `model.to_str_tokens(text)` returns them. Raises `KeyError` if the cache lacks the pattern of a
    layer. Raises `ValueError` if the cache holds several texts, if the number of tokens is not the
    number of positions, or if a pattern has NaN.
    """
    patterns = []
    for layer in range(cache.n_layers):
        pattern = of_one_text(cache["pattern", layer, "attn"], 3, tokens)
        patterns.append(pack(triangle(pattern), 1))
    return AttentionView([*tokens], patterns)
