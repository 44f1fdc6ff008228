"""`Config`: the hyper-parameters of a GPT-2. The fields have TransformerLens's names."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

from clean_transformer.reports.page import render_page
from clean_transformer.support.keywords import checks_fields
from clean_transformer.support.validation import require

NormalizationType = Literal["LN", "LNPre"]

# A `Config`, or another object that `Config.of` can read.
ConfigLike = Any


# n_layers, n_heads and d_model of each published checkpoint (Radford et al. 2019, table 2).
PUBLISHED = {
    "small": (12, 12, 768),
    "medium": (24, 16, 1024),
    "large": (36, 20, 1280),
    "xl": (48, 25, 1600),
}

# What the `Config` of the ARENA exercises calls two of our fields.
ARENA_NAMES = {"eps": "layer_norm_eps", "initializer_range": "init_range"}


@checks_fields
@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of a GPT-2.

    - `n_layers`: number of blocks.
    - `n_heads`: number of attention heads in each block.
    - `d_model`: width of the residual stream.
    - `d_head`: width of the queries, keys and values of one head.
    - `d_mlp`: width of the MLP's hidden layer.
    - `d_vocab`: number of tokens in the vocabulary.
    - `n_ctx`: largest number of positions in one input.
    - `eps`: the number that LayerNorm adds to the variance.
    - `initializer_range`: standard deviation of randomly initialized weights.
    - `normalization_type`: "LN" for LayerNorm with gain and bias, or "LNPre" for LayerNorm without
      gain and bias. "LNPre" is for folded weights, in which the weights after each LayerNorm
      already include its gain and bias.
    - `tied_unembed`: whether the unembedding matrix is the transposed embedding matrix, as in every
      published GPT-2.

    The `cfg` of a model also has the attributes `device` and `dtype` of the model's weights.

    Raises `ValueError` for an invalid value. The message names the field.
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

    # What else TransformerLens's tools read from a configuration. The same for every GPT-2.
    act_fn: ClassVar[str] = "gelu_new"
    attn_only: ClassVar[bool] = False
    default_prepend_bos: ClassVar[bool] = True
    n_key_value_heads: ClassVar[None] = None
    positional_embedding_type: ClassVar[str] = "standard"

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
        """Return the architecture of a published GPT-2: "small", "medium", "large" or "xl".

        Each keyword argument in `changes` replaces the value of the field with the same name.
        Raises `ValueError` for an unknown `size`.
        """
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

    @classmethod
    def of(cls, other: ConfigLike) -> "Config":
        """Return `other` itself if it is a `Config`, or else a `Config` with its hyper-parameters.

        `other` has the same attributes as a `Config`, such as the `Config` of the ARENA exercises:
        `eps` and `initializer_range` may have ARENA's names `layer_norm_eps` and `init_range`. If
        `other` has no `normalization_type`, it is "LN". If `other` has no `tied_unembed`, it is
        False, as in ARENA and TransformerLens.

        Raises `TypeError` if another attribute is missing. Raises `ValueError` for invalid values,
        and if `other` says that the architecture is not that of GPT-2, for example with
        `act_fn="relu"`.
        """
        if isinstance(other, cls):
            return other
        values: dict[str, Any] = {"normalization_type": "LN", "tied_unembed": False}
        for field in fields(cls):
            for name in (field.name, ARENA_NAMES.get(field.name, "")):
                if hasattr(other, name):
                    values[field.name] = getattr(other, name)
        missing = [field.name for field in fields(cls) if field.name not in values]
        if missing:
            raise TypeError(f"{type(other).__name__!r} is no Config: it has no {missing[0]}")
        for name in ("act_fn", "attn_only", "n_key_value_heads", "positional_embedding_type"):
            ours = getattr(cls, name)
            require(other, name, getattr(other, name, ours) == ours, repr(ours))
        return cls(**values)

    @property
    def layer_norm_eps(self) -> float:
        """The same as `eps`. The ARENA exercises use this name."""
        return self.eps

    @property
    def init_range(self) -> float:
        """The same as `initializer_range`. The ARENA exercises use this name."""
        return self.initializer_range

    def axes(self) -> dict[str, int]:
        """Return a dictionary from the name of each axis of the weights to the axis's length."""
        return {
            "head": self.n_heads,
            "d_model": self.d_model,
            "d_head": self.d_head,
            "d_mlp": self.d_mlp,
            "d_vocab": self.d_vocab,
            "n_ctx": self.n_ctx,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary from the name of each field to its value."""
        return asdict(self)

    def _repr_html_(self) -> str:
        return render_page("facts.html.jinja", title="Config", facts=self.to_dict())


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: object) -> bool:
    # The comparison of a NumPy float, which TransformerLens's configurations have, is no bool.
    return isinstance(value, (int, float)) and math.isfinite(value) and bool(value > 0)
