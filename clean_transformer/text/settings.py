"""`Sampling`: settings for choosing the next token.

This file does not import PyTorch, so that the command line, which shows the help texts in this
file, starts quickly.
"""

import math
from dataclasses import dataclass
from typing import Annotated, SupportsFloat, TypedDict

from clean_transformer.support.keywords import checks_fields
from clean_transformer.support.validation import require


class SamplingSettings(TypedDict, total=False):
    """The names and types of `Sampling`'s fields, for functions with these keyword arguments."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    frequency_penalty: float
    seed: int | None


@checks_fields
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for choosing the next token.

    `clean-transformer generate --help` shows the help text of each field. The penalties are applied
    to the logits first, then `temperature`, `top_k`, `top_p` and `min_p`, in the same order as in
    transformers. If `seed` is None, PyTorch's global generator draws the tokens.

    Raises `ValueError` for an invalid value. The message names the field.
    """

    temperature: Annotated[
        float,
        "0 takes the most likely token. Above 0, the next token is drawn at random, after the "
        "logits are divided by the temperature.",
    ] = 0.0
    top_k: Annotated[int | None, "Draw from the k most likely tokens only."] = None
    top_p: Annotated[
        float | None,
        "Draw from the fewest most likely tokens whose probabilities sum to at least p.",
    ] = None
    min_p: Annotated[
        float | None,
        "Draw from the tokens that are at least p times as likely as the most likely token.",
    ] = None
    repetition_penalty: Annotated[
        float,
        "Above 1: every token of the prompt and of the new text becomes less likely. 1 is off.",
    ] = 1.0
    frequency_penalty: Annotated[
        float, "Subtract this from a token's logit each time the token was generated. 0 is off."
    ] = 0.0
    seed: Annotated[int | None, "Draw the same tokens each time with the same seed."] = None

    def __post_init__(self) -> None:
        finite = math.isfinite
        for field, holds, wanted in (
            ("temperature", lambda t: finite(t) and t >= 0, "0 or a positive number"),
            ("top_k", lambda k: isinstance(k, int) and k > 0, "a positive integer"),
            ("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1"),
            ("min_p", lambda p: 0 <= p <= 1, "from 0 to 1"),
            ("repetition_penalty", lambda x: finite(x) and 0.01 <= x <= 100, "from 0.01 to 100"),
            ("frequency_penalty", finite, "a finite number"),
        ):
            value = getattr(self, field)
            is_number = isinstance(value, SupportsFloat)  # a str is none
            require(self, field, value is None or (is_number and holds(value)), wanted)
        for field in ("top_k", "top_p", "min_p"):
            require(
                self,
                field,
                self.temperature > 0 or getattr(self, field) is None,
                "None at temperature 0, which takes the most likely token; set a temperature too, "
                "such as 1.0",
            )
