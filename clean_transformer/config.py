"""The hyper-parameters of a GPT-2, under TransformerLens's names."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from clean_transformer.support.validation import require

NormalizationType = Literal["LN", "LNPre"]


# Radford et al. 2019, table 2, with the sizes of the released checkpoints: layers, heads, width.
PUBLISHED = {
    "small": (12, 12, 768),
    "medium": (24, 16, 1024),
    "large": (36, 20, 1280),
    "xl": (48, 25, 1600),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """One GPT-2 architecture.

    `normalization_type` is "LN", or "LNPre" once the LayerNorms' gains and biases have been folded
    into the weights that follow them. `tied_unembed` says that the unembedding is the transposed
    embedding, as in every published GPT-2. `eps` is the LayerNorm epsilon, inside the root.

    Raises `ValueError`, naming the field, for a combination that no model can have.
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int = 50257
    n_ctx: int = 1024
    eps: float = 1e-5
    initializer_range: float = 0.02
    normalization_type: NormalizationType = "LN"
    tied_unembed: bool = True

    def __post_init__(self) -> None:
        for field in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx"):
            require(self, field, _is_count(getattr(self, field)), "a positive integer")
        require(self, "eps", _is_positive(self.eps), "a positive number")
        require(
            self, "initializer_range", _is_positive(self.initializer_range), "a positive number"
        )
        known = get_args(NormalizationType)
        require(self, "normalization_type", self.normalization_type in known, f"one of {known}")
        require(self, "tied_unembed", isinstance(self.tied_unembed, bool), "True or False")
        require(
            self,
            "tied_unembed",
            not (self.tied_unembed and self.normalization_type == "LNPre"),
            "False with normalization_type='LNPre', which folds a gain into the unembedding only",
        )

    @classmethod
    def gpt2(cls, size: str = "small", **changes: Any) -> "Config":
        """The published architecture of that size: "small", "medium", "large" or "xl"."""
        if size not in PUBLISHED:
            raise ValueError(f"no published GPT-2 has size {size!r}; choose from {[*PUBLISHED]}")
        n_layers, n_heads, d_model = PUBLISHED[size]
        published = cls(
            n_layers=n_layers,
            n_heads=n_heads,
            d_model=d_model,
            d_head=d_model // n_heads,
            d_mlp=4 * d_model,
        )
        return replace(published, **changes)

    def axes(self) -> dict[str, int]:
        """The lengths that weight shapes are made of, by their name in an einops pattern."""
        return {
            "head": self.n_heads,
            "d_model": self.d_model,
            "d_head": self.d_head,
            "d_mlp": self.d_mlp,
            "d_vocab": self.d_vocab,
            "n_ctx": self.n_ctx,
        }

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for reports."""
        return asdict(self)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0
