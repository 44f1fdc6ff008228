"""The settings of `generate`, without PyTorch: the command line takes its options from them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the next token is chosen: the fields of `Sampling`, with a help text each.

    Raises `ValueError`, naming the setting, for a value that makes no sense.
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
        self._require("temperature", lambda t: finite(t) and t >= 0, "0 or a positive number")
        self._require("top_k", lambda k: isinstance(k, int) and k > 0, "a positive integer")
        self._require("top_p", lambda p: 0 < p <= 1, "above 0 and at most 1")
        self._require("min_p", lambda p: 0 <= p <= 1, "from 0 to 1")
        self._require("repetition_penalty", lambda x: finite(x) and x > 0, "a positive number")
        self._require("frequency_penalty", finite, "a finite number")
        for name in ("top_k", "top_p", "min_p"):
            if not self.temperature and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} chooses among tokens that are drawn, and at temperature 0 the most "
                    "likely one is taken; give a temperature too, such as 1.0"
                )

    def _require(self, name: str, holds: Callable[[Any], bool], wanted: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")
