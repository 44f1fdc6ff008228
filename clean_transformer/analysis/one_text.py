"""Checks that the activations and the tokens that a caller passes belong to the same text."""

from collections.abc import Sequence

from torch import Tensor


def of_one_text(activation: Tensor, ndim: int, tokens: Sequence[str]) -> Tensor:
    """Return the activation without its batch dimension, as a tensor of `ndim` dimensions.

    Raises `ValueError` if the batch has several texts, or if `tokens` does not have one token for
    each position of the activation.
    """
    if activation.ndim > ndim:
        if len(activation) != 1:
            raise ValueError(
                f"the activation is of {len(activation)} texts; run the model on one text"
            )
        activation = activation[0]
    require_as_many(activation.shape[-2], tokens)
    return activation


def require_as_many(positions: int, tokens: Sequence[str]) -> None:
    """Raise `ValueError` unless `tokens` has exactly `positions` entries, one for each position."""
    if len(tokens) != positions:
        raise ValueError(
            f"{len(tokens)} tokens for {positions} positions; "
            "give model.to_str_tokens of the text that the model read"
        )
